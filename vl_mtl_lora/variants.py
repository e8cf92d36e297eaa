"""Other adapters, to compare MTL-LoRA with: the same router, injection and places.

Shape letters as in `layer`. What else the literature calls a method is a setting of `MTLLoRALinear`: a LoRA that all
tasks share (`num_up` 1, `transform` "none"), one for each task ("own"), HydraLoRA's several B without Lambda ("none").
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vl_mtl_lora.errors import UserError
from vl_mtl_lora.layer import MTLLoRALinear, kaiming
from vl_mtl_lora.ops import mixture


class MultiLoRALinear(MTLLoRALinear):
    """MultiLoRA (arXiv 2311.11501): N LoRAs of rank R side by side, shared by all tasks. Both factors start as random,
    and each output of each LoRA is scaled by a learned number that starts at zero.

    down (S, N*R, I), up (S, 1, N*R, C), scaling (S, N, C).
    """

    library_names = {**MTLLoRALinear.library_names, "scaling": None}

    def make_parameters(self, slices, tasks, num_up, columns, transform, like):
        self.down = kaiming(torch.empty(slices, num_up * self.rank, self.in_features, **like))
        bound = self.rank ** -0.5  # Kaiming's, a = sqrt(5), of each B by itself: (C, R)
        self.up = nn.Parameter(torch.empty(slices, 1, num_up * self.rank, columns, **like).uniform_(-bound, bound))
        self.scaling = nn.Parameter(torch.zeros(slices, num_up, columns, **like))
        self.register_buffer("transform", torch.ones(slices, tasks, num_up * self.rank, **like), persistent=False)
        self.register_buffer("mix", torch.zeros(slices, tasks, 1, **like), persistent=False)

    @staticmethod
    def sizes(tasks, rank, num_up, transform):
        return {"down": (num_up * rank,), "up": (1, num_up * rank), "scaling": (num_up,)}

    def factors(self):
        return self.down, self.transform, self.up * self.scaling.repeat_interleave(self.rank, 1).unsqueeze(1), self.mix


class MoELoRALinear(MTLLoRALinear):
    """MOELoRA (arXiv 2310.18339): N experts, each a LoRA of rank R, weighed for each task by a gate that knows the task
    alone, softmax(w_t). A starts as in its code, whose r is N * R here, and whose gate is one for all layers.

    down (S, N*R, I), up (S, 1, N*R, C), mix (S, T, N), the gate.
    """

    def make_parameters(self, slices, tasks, num_up, columns, transform, like):
        self.down = nn.Parameter(torch.empty(slices, num_up * self.rank, self.in_features, **like).normal_(std=0.01))
        self.up = nn.Parameter(torch.zeros(slices, 1, num_up * self.rank, columns, **like))
        self.mix = kaiming(torch.empty(slices, tasks, num_up, **like))
        self.temperature = 1.0
        self.register_buffer("one", torch.zeros(slices, tasks, 1, **like), persistent=False)  # softmax of one logit

    @staticmethod
    def sizes(tasks, rank, num_up, transform):
        return {"down": (num_up * rank,), "up": (1, num_up * rank), "mix": (tasks, num_up)}

    def factors(self):
        gate = mixture(self.mix, self.temperature, 1.0).repeat_interleave(self.rank, -1)
        return self.down, gate.to(self.down.dtype), self.up, self.one


class DoRALinear(MTLLoRALinear):
    """DoRA (arXiv 2402.09353, eq. 5 and 11): a LoRA that all tasks share turns each row of W, and a learned magnitude
    gives its length; the length that W + BA itself has is taken as constant.

    magnitude (S, C), beside a LoRA's down and up.

    Raises:
        UserError: the base is quantised, or its weights are spread over devices.
    """

    library_names = {**MTLLoRALinear.library_names, "magnitude": None}
    folds = False

    def make_parameters(self, slices, tasks, num_up, columns, transform, like):
        if not self.plain:
            raise UserError("adapter.method: dora needs plain weights, not quantised or spread ones")
        super().make_parameters(slices, tasks, 1, columns, "none", like)
        self.magnitude = nn.Parameter(self.lengths(self._parts(self.weight)).to(**like))

    @staticmethod
    def sizes(tasks, rank, num_up, transform):
        return {**MTLLoRALinear.sizes(tasks, rank, 1, "none"), "magnitude": ()}

    def adapted(self, x, route):
        y = self.product(x, route, self.weight, None)
        y = (y * self.stretch()).to(y.dtype)  # rounded before, lengths close to the start's would all be 1 in bfloat16
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def stretch(self) -> Tensor:
        """(O,), by how much each row of W + BA is too short."""
        down, up = self.down.detach(), self.up.detach().squeeze(1)
        lengths = self.lengths(self._parts(self.weight) + self.scale * torch.einsum("src,sri->sci", up, down))
        parts = torch.ones(self.out_features // lengths.shape[1], lengths.shape[1], device=up.device, dtype=up.dtype)
        parts[list(self.slices)] = self.magnitude / lengths
        return parts.flatten()

    @torch.no_grad()
    def updated(self, task_index):
        return super().updated(task_index) * self.stretch().double().unsqueeze(1)

    def _parts(self, weight: Tensor) -> Tensor:
        """(O, I) -> the adapted slices (S, C, I), in the adapter's precision."""
        parts = weight.detach().unflatten(0, (-1, self.up.shape[-1]))[list(self.slices)]
        return parts.to(self.up.dtype)

    @staticmethod
    def lengths(parts: Tensor) -> Tensor:
        """(S, C, I) -> (S, C)."""
        return torch.linalg.vector_norm(parts, dim=-1)


class FullLinear(MTLLoRALinear):
    """Full fine-tuning, for all tasks alike: delta (S, C, I) is added to the frozen weight.

    Raises:
        UserError: the base is quantised, or its weights are spread over devices.
    """

    library_names = {**MTLLoRALinear.library_names, "delta": None}
    folds = False

    def make_parameters(self, slices, tasks, num_up, columns, transform, like):
        if not self.plain:
            raise UserError("adapter.method: full needs plain weights, not quantised or spread ones")
        self.delta = nn.Parameter(torch.zeros(slices, columns, self.in_features, **like))

    @staticmethod
    def sizes(tasks, rank, num_up, transform):
        return {"delta": ()}

    def adapted(self, x, route):
        return F.linear(x, (self.weight + self._whole()).to(x.dtype), self.bias)

    def _whole(self) -> Tensor:
        """(O, I)"""
        parts = self.delta.new_zeros(self.out_features // self.delta.shape[1], *self.delta.shape[1:])
        parts[list(self.slices)] = self.delta
        return parts.flatten(0, 1)

    @torch.no_grad()
    def updated(self, task_index):
        return self.weight.double() + self._whole().double()

    def operations(self, rows, to_input):
        return 0, 2 * rows * self.delta.numel()

    def extra_repr(self):
        return f"tower={self.tower}, slices={self.slices}"
