"""Files of Hugging Face models whose tensors are not the model's own: renamed, merged or split, as transformers says.

``transformers`` 5 writes a model under the names that its family had first, and one tensor per expert. Its own conversion, which
``from_pretrained`` applies, is applied here to one parameter at a time.
"""

from __future__ import annotations

import copy
import importlib
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from funicular.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["Conversion", "Made"]


class Made(NamedTuple):
    """Parameters that are made from several tensors of a file, or from one that is changed."""

    #: the first of the parameters' names
    first: str
    converter: Any
    #: (pattern that the converter knows it by, name in the file)
    sources: list[tuple[str, str]]
    #: names and shapes of what comes out
    shapes: dict[str, tuple[int, ...]]


class Conversion:
    """What transformers does to a file's tensors before they are a model's.

    Attributes
    ----------
    names : dict
        Names in the file of the tensors that are only renamed, by the model's names.
    made : dict
        What is made of other tensors, by the model's names.
    """

    def __init__(self, model: Any, mapping: list[Any], tensors: dict[str, tuple[int, ...]], loading: Any) -> None:
        self._model, self._mapping = model, mapping
        self.names: dict[str, str] = {}
        self.made: dict[str, Made] = {}
        renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        own, prefix = model.state_dict(), model.base_model_prefix
        groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        # In transformers' order: some of its renamings depend on what was seen before.
        for key in sorted(tensors, key=loading.dot_natural_key):
            name, pattern = loading.rename_source_key(key, renamings, converters, prefix, own)
            if name not in own and key in own:
                name, pattern = loading.rename_source_key(key, [], [], prefix, own)
            if name not in own:
                continue
            if pattern is None:
                self.names[name] = key
            else:
                groups.setdefault(name, (copy.deepcopy(by_pattern[pattern]), []))[1].append((pattern, key))
        for first, (converter, sources) in groups.items():
            blank = Made(first, converter, sources, {})
            try:
                shaped = self.convert(blank, lambda key: torch.empty(tensors[key], device="meta"))
            except Exception as error:
                keys = ", ".join(key for _, key in sources[:3])
                raise UsageError(
                    "FN-E407",
                    f"transformers cannot make '{first}' of {len(sources)} tensors of the file ({keys}, ...): {error}. Nothing was loaded.",
                ) from error
            made = blank._replace(shapes={name: tuple(t.shape) for name, t in shaped.items()})
            self.made.update(dict.fromkeys(made.shapes, made))

    @staticmethod
    def of(model: nn.Module, tensors: dict[str, tuple[int, ...]]) -> Conversion | None:
        """Return the conversion for a model and the tensors of a file; None where transformers has none.

        transformers is not imported for it: a model of its own has done that.
        """
        modeling: Any = sys.modules.get("transformers.modeling_utils")
        if modeling is None or not isinstance(model, modeling.PreTrainedModel):
            return None
        try:
            mappings: Any = importlib.import_module("transformers.conversion_mapping")
            loading: Any = importlib.import_module("transformers.core_model_loading")
            mapping = mappings.get_model_conversion_mapping(model)
        except (ImportError, AttributeError):  # transformers 4 keeps the names
            return None
        return Conversion(model, mapping, tensors, loading)

    def convert(self, made: Made, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Make parameters of a file's tensors.

        Parameters
        ----------
        read : callable
            Returns the tensor of a name in the file.
        """
        converter = copy.deepcopy(made.converter)
        for pattern, key in made.sources:
            converter.add_tensor(made.first, key, pattern, read(key))
        found = converter.convert(made.first, model=self._model, config=self._model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in found.items()}

    def done(self) -> None:
        """Let ``save_pretrained`` write the model as it was read, as it does after ``from_pretrained``."""
        # Earlier versions of transformers do not note what they used.
        used = [entry for entry in self._mapping if getattr(entry, "was_used", lambda: True)()]
        self._model._weight_conversions = used
