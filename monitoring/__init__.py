"""What watches clerk-sync: rules and dashboard as data, and the files that are made of them."""
