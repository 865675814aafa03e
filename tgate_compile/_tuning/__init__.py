"""Which schedule is the cheapest whose images stay close enough: candidates, measurements, choice and picture."""
