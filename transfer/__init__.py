"""The transfer experiments: a package per task family, and what they share."""

import mae_core  # noqa: F401  (answers a missing torch with a sentence, before anything here imports it)
