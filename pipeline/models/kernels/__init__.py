"""Operations with our own backward passes or memory layouts."""
