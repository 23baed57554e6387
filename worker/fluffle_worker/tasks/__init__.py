"""Tasks made from the models of other libraries."""
