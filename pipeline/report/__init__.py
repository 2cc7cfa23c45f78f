"""The pages people look at: self-contained HTML, drawn without a network."""
