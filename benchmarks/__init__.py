"""Every task on every checkpoint, and the tables of the MAE paper with our rows in them."""
