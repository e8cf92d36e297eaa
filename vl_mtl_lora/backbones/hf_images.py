"""Pictures for transformers' models: the model's own image processor, and batches of what it returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from vl_mtl_lora.errors import UserError

# The processors have no augmentation of their own: part of the picture is cut out before, as open_clip does by default.
_AUGMENTATION = {"scale": (0.9, 1.0), "ratio": (3 / 4, 4 / 3)}


@dataclass(frozen=True)
class Pictures:
    """The pictures of a batch, one after the other, as the image tower takes them.

    inputs: tensors by the names of the model's own arguments.
    tokens: per picture, the ids that stand for it in a text (empty where the model writes through a prefix).
    counts: per row, how many pictures it has.
    rows:   per picture, how many rows the image tower sees of it: 1, its crops, or its patches where the tower has no
            batch axis.
    """

    inputs: Mapping[str, Tensor]
    tokens: Sequence[Sequence[int]]
    counts: Sequence[int]
    rows: Sequence[int]

    @staticmethod
    def of_one(inputs: Mapping[str, Tensor], tokens: Sequence[int] = ()) -> "Pictures":
        """One picture, as the processor returns it with a batch of one."""
        pixels = inputs["pixel_values"]  # (crops, 3, H, W), (1, crops, 3, H, W) or (patches, values)
        return Pictures(inputs, [list(tokens)], [1], [pixels.shape[1] if pixels.dim() == 5 else pixels.shape[0]])

    @staticmethod
    def join(batches: Sequence["Pictures"], one_row: bool = False) -> "Pictures":
        """Batches one after the other; crops that others have more of are padded with zeros, as the models expect.

        one_row: all the pictures belong to one row.
        """
        if one_row and "batch_num_images" in batches[0].inputs:
            raise UserError("this model prepares the pictures of one text together, crops only where there is one: "
                            "give one picture per row")
        inputs = {name: _cat([b.inputs[name] for b in batches]) for name in batches[0].inputs}
        counts = [count for b in batches for count in b.counts]
        return Pictures(inputs, [ids for b in batches for ids in b.tokens], [sum(counts)] if one_row else counts,
                        [n for b in batches for n in b.rows])

    def __len__(self) -> int:
        return len(self.counts)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Pictures":
        inputs = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.inputs.items()}
        return Pictures(inputs, self.tokens, self.counts, self.rows)


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    """(n, ...) tensors along dim 0, the others padded at their ends to the largest."""
    sizes = [max(t.shape[dim] for t in tensors) for dim in range(1, tensors[0].dim())]
    padded = []
    for tensor in tensors:
        missing = [size - have for size, have in zip(sizes, tensor.shape[1:])]
        padded.append(F.pad(tensor, [n for size in reversed(missing) for n in (0, size)]) if any(missing) else tensor)
    return torch.cat(padded)


class PictureTransform:
    """An upright RGB picture -> the model's own input.

    A (3, H, W) tensor where the model takes no more than that, else `Pictures` of one. With `processor`, the whole
    processor of a chat model, the picture's token ids come along.
    """

    def __init__(self, image_processor, train: bool, augmentation: Mapping, processor=None):
        for option in augmentation:
            if option not in _AUGMENTATION:
                raise UserError(f"augment: unknown option {option!r}", near=(option, _AUGMENTATION))
        self.image_processor, self.processor = image_processor, processor
        self.crop = {**_AUGMENTATION, **augmentation} if train else None

    def __call__(self, image: Image.Image) -> "Tensor | Pictures":
        if self.crop is not None:
            top, left, height, width = RandomResizedCrop.get_params(image, **self.crop)
            image = image.crop((left, top, left + width, top + height))
        if self.processor is not None:
            # The processor alone knows how many tokens, and which around them, stand for a picture of this size.
            token = self.processor.image_token
            out = dict(self.processor(images=[[image]], text=[token], add_special_tokens=False, return_tensors="pt"))
            tokens = out.pop("input_ids")[0].tolist()
            return Pictures.of_one(_image_inputs(out), tokens)
        out = _image_inputs(self.image_processor(images=[image], return_tensors="pt"))
        return out["pixel_values"][0] if len(out) == 1 and out["pixel_values"].dim() == 4 else Pictures.of_one(out)


def _image_inputs(out: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a processor's output describes pictures."""
    return {name: tensor for name, tensor in out.items()
            if isinstance(tensor, Tensor) and name not in ("attention_mask", "mm_token_type_ids", "token_type_ids")}
