"""Property tests: random networks and rules at random endpoints, which Hypothesis draws as data.

- :mod:`.blocks` is the table of operations and layers, in modules named after it;
- :mod:`.networks` describes a network as data, and builds it;
- :mod:`.strategies` are the Hypothesis strategies for networks and their inputs;
- :mod:`.conditioning` measures how many digits the output of a network has;
- :mod:`.exactness` is the property of networks;
- :mod:`.extremes` draws the endpoints of a single rule, from denormal numbers to 1e30.

``python -m tests.property networks`` and ``python -m tests.property rules`` are the long runs.
"""
