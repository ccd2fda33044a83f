"""What compressing costs: time and memory against n, r and d, beside other packages.

`python -m dropinf bench`. Contestants alternate in one process, each in its best form here, and are
checked against their definition before they are timed.
"""
