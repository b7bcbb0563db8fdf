"""All records as one HTML file that needs no network: tables, plots, pictures, and how each number came about."""
