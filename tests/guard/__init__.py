"""Short runs of the mini recipes on mae_mini, beside committed numbers: does every pipeline still do what it did?"""
