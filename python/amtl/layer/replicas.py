"""Tables under DistributedDataParallel, which knows the parameters that it was made with only.

When a table changes its phase, its parameters are others, and the old wrapper would no longer
average their gradients: replicas would part without a word. So whoever changes them asks for the
wrappers, makes sure that all processes are about to do the same, and puts the wrappers out of use.
What changes beside parameters, one process leads.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from amtl.layer.instances import collect_garbage, instances_of


def are_several() -> bool:
    """Whether processes train together."""
    return distributed.is_available() and distributed.is_initialized()


def wrappers_of(parameters: Iterable[nn.Parameter]) -> list[nn.Module]:
    """The living DistributedDataParallel wrappers around one of the parameters.

    O(objects in the process) where processes train together, else nothing.
    """
    if not are_several():
        return []
    wanted = {id(parameter) for parameter in parameters}

    def around() -> list[nn.Module]:
        wrappers = instances_of(DistributedDataParallel)
        return [w for w in wrappers if any(id(p) in wanted for p in w.parameters())]

    if not around():
        return []
    # A wrapper that is garbage already counts in no process, whenever each would find it out.
    collect_garbage()
    return around()


def require_same_sizes(wrappers: Sequence[Any], tensors: Sequence[Tensor], name: str) -> None:
    """Raise in all processes unless all of them hold the same integers.

    A collective call in each process group of the wrappers: all its processes have to make it.

    Raises:
        RuntimeError: they do not.
    """
    for group in {id(w.process_group): w.process_group for w in wrappers}.values():
        sums = [float(_checksum(t)) for t in tensors]
        mine = torch.tensor(sums, dtype=torch.float64, device=tensors[0].device)
        count = distributed.get_world_size(group)
        everyone = [torch.empty_like(mine) for _ in range(count)]
        distributed.all_gather(everyone, mine, group=group)
        if not all(torch.equal(mine, other) for other in everyone):
            raise RuntimeError(
                f"freeze: processes have different sizes for table {name!r}, so their tiers would "
                "not match. Give convert the same counts and options in all of them (counts summed "
                "over all processes), and freeze at the same step."
            )


def leads(buffer: Tensor) -> bool:
    """Whether this process may change a buffer by what it looks up.

    DistributedDataParallel gives all processes the buffers of the first one, before each forward
    pass that is to be averaged. So in such a pass the first one leads, and others wait for it.

    Raises:
        RuntimeError: the wrapper leaves buffers alone, so that each process would go its own way.
    """
    if not are_several():
        return True
    wrapper: Any = DistributedDataParallel._active_ddp_module
    if wrapper is None or distributed.get_world_size(wrapper.process_group) == 1:
        return True
    if not any(held is buffer for held in wrapper.module.buffers()):
        return True
    if not wrapper.broadcast_buffers:
        raise RuntimeError(
            "step sizes of a table of few bits follow what is looked up, and with "
            "broadcast_buffers=False (forward_sync_buffers=False) each process would round by its "
            "own: leave it out of DistributedDataParallel(...), which then shares those of the "
            "first process"
        )
    # Within join() it is the last process that has input, which nobody knows before.
    joins: bool = wrapper._join_config.enable
    return joins or distributed.get_rank(wrapper.process_group) == 0


def _checksum(tensor: Tensor) -> int:
    data = tensor.detach().cpu().contiguous()
    return zlib.crc32((ctypes.c_char * data.nbytes).from_address(data.data_ptr()))


def retire(wrappers: Iterable[Any]) -> None:
    """Let forward passes with gradients through these wrappers fail from now on, saying why."""
    for wrapper in wrappers:
        wrapper.register_forward_pre_hook(_refuse, prepend=True)


def _refuse(wrapper: nn.Module, inputs: object) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the parameters of an AMTL layer have changed (freeze, thaw, convert, "
            "revert or load_state_dict) since this DistributedDataParallel was made, so it would "
            "no longer keep the processes equal: wrap anew, model = "
            "DistributedDataParallel(model.module)"
        )
