"""Operations with backward passes or layouts of our own."""
