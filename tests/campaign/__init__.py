"""A campaign of faults: kills, full disks, bad inputs and hostile files against every command.

`make campaign` runs all of it and prints one table; test_campaign.py runs a small part.
"""
