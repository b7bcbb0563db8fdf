"""Every task on every checkpoint, and the tables of the MAE paper with our rows in them."""

import mae_core  # noqa: F401  (answers a missing torch with a sentence, before anything here imports it)
