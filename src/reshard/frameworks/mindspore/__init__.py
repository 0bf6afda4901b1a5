"""MindSpore: the adapter, its communicator, and the declaration of layouts.

What is saved of a model: every parameter (frozen ones too) and persistent buffer, under the name that MindSpore gave it.

* A tensor lies as `lay_out` declares, else as MindSpore itself knows (a distributed tensor's layout, that of a parameter which it has cut
  for a plan); else each rank that has it holds it whole.
* The optimizer that a training cell has inside isn't part of the model.

What is saved of an optimizer: its slots by parameter name (Adam's moments as `adam_m` and `adam_v`), its step count as `global_step`, and
its hyper-parameters by parameter name. On load a run takes what MindSpore keeps in parameters, the learning rate and the momentum; a
schedule, the betas and the weight decay stay as the run has them, since they are built into its compiled steps.
"""

from reshard.frameworks.mindspore.adapter import MindSporeAdapter
from reshard.frameworks.mindspore.communicator import connect
from reshard.frameworks.mindspore.layouts import lay_out

__all__ = ["MindSporeAdapter", "connect", "lay_out"]
