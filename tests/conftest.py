"""Settings shared by all tests."""

import torch

# pytest-xdist runs one worker per core; threads inside the workers would only compete.
torch.set_num_threads(1)
