"""Random networks, as data, and what must hold for every one of them.

- :mod:`.blocks` is the table of what networks are made of;
- :mod:`.networks` says what a network is, and builds it;
- :mod:`.strategies` lets Hypothesis draw networks and data;
- :mod:`.conditioning` says how many digits a network has to give;
- :mod:`.exactness` is the property;
- :mod:`.extremes` draws the two ends of a single rule from denormal numbers to 1e30.

``python -m tests.property networks`` and ``python -m tests.property rules`` run them at length.
"""
