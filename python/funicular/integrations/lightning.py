"""Lightning's strategy ``"funicular"``, and a callback that logs what a run does."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _init_dist_connection, _sync_ddp_if_available
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from funicular.checkpoint.save_load import load, save
from funicular.errors import UsageError
from funicular.integrations.figures import Figures
from funicular.integrations.policies import policy_of
from funicular.integrations.settings import check_ranks, refuse
from funicular.offloading import offload
from funicular.optim.adamw import AdamW
from funicular.windows.lookup import session_for
from funicular.windows.ranked import meet, together

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from funicular.windows.session import Session

__all__ = ["FunicularStrategy", "StatsCallback"]

#: what Lightning has in a checkpoint besides weights and states, written last
_REST = "lightning.ckpt"


class FunicularStrategy(ParallelStrategy):  # type: ignore[misc, unused-ignore]
    """An offloaded model: ``Trainer(strategy=FunicularStrategy("policy.toml"))``, or by name ``"funicular"``.

    With ``devices=2`` and more, processes of one host train the model together (docs/ranks.md): those that ``torchrun`` has started, or,
    in a script that ``python`` runs, those that Lightning starts, as for its strategy ``"ddp"``.

    A checkpoint ``NAME.ckpt`` is a directory: weights and states as ``funicular.save`` writes them, and ``lightning.ckpt`` with all
    else. No second copy of weights or states is made. Checkpoints of other strategies, which are files, can be loaded too.

    Parameters
    ----------
    policy : any
        All that ``funicular.offload`` takes, or the path of a DeepSpeed configuration.
    checkpoint_io : CheckpointIO or None
        Writes ``lightning.ckpt``, and removes checkpoints.
    precision_plugin : Precision or None
        As for other strategies.
    """

    strategy_name = "funicular"

    if TYPE_CHECKING:
        model: Any

    def __init__(self, policy: Any = None, *, checkpoint_io: Any = None, precision_plugin: Any = None) -> None:
        super().__init__(checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)
        self._policy = policy
        #: the checkpoint that is being loaded, and whether its states came with its weights
        self._loading: Path | None = None
        self._with_states = False

    # Processes

    @property
    def num_processes(self) -> int:
        """How many train the model: as many as ``Trainer(devices=...)`` has chosen devices."""
        return max(len(self.parallel_devices or ()), 1)

    @property
    def is_distributed(self) -> bool:
        """Whether Lightning is to deal the data out."""
        return self.num_processes > 1

    @property
    def num_nodes(self) -> int:
        """One host."""
        return 1

    @num_nodes.setter
    def num_nodes(self, number: int) -> None:
        if number > 1:
            refuse(f"num_nodes={number}", "Say num_nodes=1: ranks train on one host so far.")

    @property
    def root_device(self) -> torch.device:
        """Where the model computes."""
        return (
            self.parallel_devices[self.local_rank if self.is_distributed else 0]
            if self.parallel_devices
            else torch.device("cpu")
        )

    @property
    def global_rank(self) -> int:
        """The number of this process."""
        return int(super().global_rank) if self.is_distributed else 0

    @property
    def world_size(self) -> int:
        """As :attr:`num_processes`."""
        return self.num_processes

    def _configure_launcher(self) -> None:
        if self.is_distributed:
            if hasattr(sys, "ps1") and not self.cluster_environment.creates_processes_externally:
                refuse(
                    f"devices={self.num_processes} in a notebook or at a prompt",
                    "Write a script, and start it with torchrun or python: what is there already would have to be forked.",
                )
            self._launcher = _SubprocessScriptLauncher(self.cluster_environment, self.num_processes, 1)

    def set_world_ranks(self) -> None:
        """Tell the launcher's environment, and what logs on rank 0 alone, who this is."""
        started = 1 if self.cluster_environment is None else self.cluster_environment.world_size()
        if started > 1 and started != self.num_processes:
            refuse(
                f"a launcher has started {started} processes, and devices={self.num_processes}",
                f"Say devices={started}, or start the script with python.",
            )
        if self.is_distributed:
            self.cluster_environment.set_global_rank(self.local_rank)
            self.cluster_environment.set_world_size(self.num_processes)
            rank_zero_only.rank = self.global_rank

    def setup_environment(self) -> None:
        """As in other strategies; of several processes each gets to know the others."""
        super().setup_environment()
        if self.is_distributed:
            self.set_world_ranks()
            _init_dist_connection(self.cluster_environment, "nccl" if self.root_device.type == "cuda" else "gloo")

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks: once the model is offloaded, however long one takes, for it may be saving."""
        session = self._session()
        if session is not None:
            meet(session, name or "a barrier of Lightning")
        elif self.is_distributed and dist.is_initialized():
            dist.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return what rank ``src`` has."""
        if not self.is_distributed:
            return obj
        found = [obj]
        dist.broadcast_object_list(found, src)
        return found[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Return the mean, or what else is asked for, over ranks."""
        if not self.is_distributed or not isinstance(tensor, torch.Tensor):
            return tensor
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op)

    def _session(self) -> Session | None:
        return None if self.model is None else session_for(self.model)

    # Placing

    def setup(self, trainer: Any) -> None:
        """As in other strategies, but states of optimizers stay where they live."""
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.model = self._setup_model(self.model)
        if str(getattr(trainer.state.fn, "value", trainer.state.fn)) == "fit":
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        self._check_ranks()

    def _check_ranks(self) -> None:
        """Refuse what each of several ranks would do by itself."""
        if not self.is_distributed:
            return
        ranks = f"on {self.world_size} ranks"
        for optimizer in self.optimizers:
            inner = getattr(optimizer, "optimizer", optimizer)
            if not isinstance(inner, AdamW):
                refuse(
                    f"{type(inner).__name__} {ranks} edits weights that are the same memory for all",
                    "Return funicular.AdamW from configure_optimizers.",
                )
        if getattr(self.precision_plugin, "scaler", None) is not None:
            refuse(
                f"precision='16-mixed' {ranks} edits gradients that are the same memory for all", "Say 'bf16-mixed'."
            )
        if self._layer_sync is not None:
            refuse(
                "sync_batchnorm=True",
                "Leave it out, and call torch.nn.SyncBatchNorm.convert_sync_batchnorm in the model's constructor.",
            )

    @contextlib.contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """As in other strategies, but on the CPU: what is offloaded may not fit onto the GPU, which rounds initial values in another way, too."""
        with super().tensor_init_context(empty_init), torch.device("cpu"):
            yield

    def model_to_device(self) -> None:
        """Offload the model, unless it is: ``configure_model`` may have offloaded a part, and an earlier run the whole."""
        if session_for(self.model) is None:
            group = None if self.is_distributed else "single"
            offload(self.model, policy_of(self._policy, self.root_device), group=group)
        session = self._session()
        assert session is not None
        check_ranks(session, self.world_size, self.global_rank)

    def teardown(self) -> None:
        """Leave the model offloaded: it can be tested, saved, and trained on."""
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        if self.accelerator is not None:
            self.accelerator.teardown()
        self.checkpoint_io.teardown()

    # Checkpoints

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """True: what is loaded goes to where it lives."""
        return True

    def _paged(self) -> torch.optim.Optimizer | None:
        """Return the optimizer whose states are saved beside the weights; None if there are several, or another kind."""
        found = [getattr(one, "optimizer", one) for one in self.optimizers]
        return found[0] if len(found) == 1 and isinstance(found[0], (AdamW, torch.optim.AdamW)) else None

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return nothing: :meth:`save_checkpoint` writes the weights from where they live."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return nothing for an optimizer whose states :meth:`save_checkpoint` writes."""
        if self._paged() is not None:
            return {}
        found: dict[str, Any] = super().optimizer_state(optimizer)
        return found

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a directory; it counts once ``lightning.ckpt`` is there. Of several ranks the first writes, and the others wait."""
        path = Path(filepath)
        rest = path / _REST
        with together(self._session(), f"saved {path}"):
            if not self.is_global_zero:
                return
            rest.unlink(missing_ok=True)
            save(self._module(), self._paged() if "optimizer_states" in checkpoint else None, path, overwrite=True)
            unfinished = rest.with_suffix(".part")
            self.checkpoint_io.save_checkpoint(checkpoint, os.fspath(unfinished), storage_options=storage_options)
            unfinished.replace(rest)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read ``lightning.ckpt``; weights and states follow when the trainer asks for them.

        Raises
        ------
        UsageError
            ``FN-E404`` if the checkpoint was not written to its end.
        """
        path = Path(checkpoint_path)
        self._loading, self._with_states = None, False
        if path.is_dir():
            if not (path / _REST).is_file():
                raise UsageError(
                    "FN-E404",
                    f"{path} has no {_REST}: it is no checkpoint of this strategy, or its save was killed. Resume from an earlier one; "
                    "funicular.load reads its weights.",
                )
            self._loading, checkpoint_path = path, os.fspath(path / _REST)
        read: dict[str, Any] = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        return read

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights to where they live; in a fit that goes on, the states with them."""
        if self._loading is None:
            if self.is_distributed:
                refuse(
                    f"a checkpoint of another strategy on {self.world_size} ranks: each would write the weights that all share",
                    "Go on from it with devices=1.",
                )
            super().load_model_state_dict(checkpoint, strict=strict)
            return
        opt = self._paged() if "optimizer_states" in checkpoint else None
        # Random states stay as they are, as in other strategies: the order of the data may come from them.
        load(self._loading, self._module(), opt, random=False)
        self._with_states = opt is not None

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load states that did not come with the weights, to where they live."""
        if self._with_states:
            return
        if self.is_distributed:
            refuse(
                f"states of {len(self.optimizers)} optimizers on {self.world_size} ranks: each would write the states that all share",
                "Go on from this checkpoint with devices=1, or use one optimizer with several groups.",
            )
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"]):
            optimizer.load_state_dict(state)

    def _module(self) -> nn.Module:
        module: nn.Module = self.lightning_module
        return module

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register the strategy under its name."""
        strategy_registry.register(
            cls.strategy_name, cls, description="An offloaded model on one or several GPUs of a host"
        )


class StatsCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Logs tokens per second, MFU, stalls and the use of tiers by the trainer's own loggers, every ``log_every_n_steps``.

    Parameters
    ----------
    peak_flops : float or None
        Operations per second of the device at best, if it is none of those that are known.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        self._peak = peak_flops
        self._figures: Figures | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count."""
        self._figures = Figures(pl_module, self._peak)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count a batch, and log where the trainer logs."""
        if self._figures is None:
            return
        self._figures.count(batch)
        if trainer.global_step and trainer.global_step % trainer.log_every_n_steps == 0:
            figures = self._figures.take()
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Count no more."""
        if self._figures is not None:
            self._figures.close()
            self._figures = None


if FunicularStrategy.strategy_name not in StrategyRegistry.available_strategies():
    FunicularStrategy.register_strategies(StrategyRegistry)
