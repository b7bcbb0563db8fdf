"""The miniature: small generated copies of the datasets in their official layouts."""
