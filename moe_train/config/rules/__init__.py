"""What must hold between fields: one function for each rule, each raising `Impossible` with values that would work."""
