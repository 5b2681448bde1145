"""What one run is: model, precision, data, recipe, loop. Only `assemble` knows how ranks cooperate."""

import os

from train.device_variables import set_defaults

# Read once, when torch loads its OpenMP: threads that spin at a barrier while another process wants the core make a
# small product ten times slower. Sleeping costs a fifth where a machine is otherwise idle; say `active` there.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Read when torch is loaded: a rank whose peer is gone says so in a sentence, and torch beside it in forty lines of its
# own stack.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
set_defaults()
