"""A search over settings of an intervention: what is tried, how it is measured, what is tried next."""
