"""The transfer experiments: one file per task family, each a module and a script."""
