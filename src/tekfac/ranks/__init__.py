"""Processes that train one model together: what they tell one another, and who does what."""
