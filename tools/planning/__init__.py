"""What `moe-plan` is made of: rows of published runs, the search, costs, pictures and reports."""
