"""The autograd function of the rescale rule, the reference tape and its compiled form."""
