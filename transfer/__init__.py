"""The transfer experiments: one file per task family, each a module and a script."""

import mae_core  # noqa: F401  (answers a missing torch with a sentence, before anything here imports it)
