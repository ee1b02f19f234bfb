"""Features that never change, on disk or in memory: the base model's own, narrowed or smoothed ones, a teacher's."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate.utils import tqdm
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from rfa_llm.data.pairing import first_counted, pad_rows
from rfa_llm.files import written_whole

logger = logging.get_logger(__name__)

# Rows of a file: what a kill can cost, and what is in memory before it is written.
ROWS_A_FILE = 64
# (input_ids, attention_mask), each [rows, tokens] -> [rows, tokens, hidden] a block.
ReadFeatures = Callable[..., list[torch.Tensor]]


def batches(
    rows: Sequence[dict], tokens: str, pad_token_id: int, batch_size: int, desc: str | None = None
) -> Iterator[dict]:
    """Encoded rows in order, as padded batches (`pad_rows`); with a progress bar where it is given a text."""
    for start in tqdm(range(0, len(rows), batch_size), desc=desc, unit="batch", disable=desc is None):
        batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        yield pad_rows(batch, [tokens] * len(batch), pad_token_id)


def row_features(
    run: ReadFeatures, rows: Iterable[dict], aligned: Sequence[int], device: torch.device
) -> dict[str, torch.Tensor]:
    """Features of the tokens that count, one row after the other.

    Args:
        run: What computes features.
        rows: Padded batches with their `token_mask`.
        aligned: Block indices, for the names.
        device: Where `run` takes its input.

    Returns:
        `block_{b}` `[all tokens, hidden]` in `run`'s dtype and `offsets` `[rows + 1]` int64, where each row begins;
        on the CPU.
    """
    kept: list[list[torch.Tensor]] = [[] for _ in aligned]
    counts = [0]
    for batch in rows:
        mask = batch["token_mask"]
        features = run(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device))
        for of_block, feature in zip(kept, features, strict=True):
            of_block.append(feature.cpu()[mask])
        counts += mask.sum(1).tolist()
    blocks = {f"block_{index}": torch.cat(of_block) for index, of_block in zip(aligned, kept, strict=True)}
    return {**blocks, "offsets": torch.tensor(counts).cumsum(0)}


def save_whole(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a file that appears whole or not at all."""
    with written_whole(path) as part:
        save_file(tensors, part)


class FeatureRows:
    """Reads what `row_features` gave, row by row, from memory or memory-mapped from a file that `save_whole` wrote.

    Args:
        tensors: What `row_features` gave, or the path of the file.
        aligned: Aligned block indices.
    """

    def __init__(self, tensors: dict[str, torch.Tensor] | Path, aligned: Sequence[int]):
        names = [f"block_{index}" for index in aligned]
        if isinstance(tensors, Path):
            file = safe_open(tensors, framework="pt")
            self._blocks, offsets = [file.get_slice(name) for name in names], file.get_tensor("offsets")
        else:
            self._blocks, offsets = [tensors[name] for name in names], tensors["offsets"]
        self._offsets = offsets.tolist()

    def row(self, index: int) -> list[torch.Tensor]:
        """Features of a row's tokens that count, `[n, hidden]` a block."""
        return [block[self._offsets[index] : self._offsets[index + 1]] for block in self._blocks]


def join(rows: Sequence[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Rows' features, a list of blocks each, one row after the other: `[n, hidden]` a block."""
    return [torch.cat(of_block) for of_block in zip(*rows, strict=True)]


class FeatureCache:
    """Features of a set's rows, each computed once and kept in files of `ROWS_A_FILE` rows, or in memory.

    A file is named by a digest of all that its features depend on, so what another run left there is found again
    where it fits, and only there.

    Args:
        folder: Where the files lie; `None` keeps the features in memory.
        key: What the features depend on beside the rows and `tokens`.
        aligned: Aligned block indices.
        dataset: Encoded set.
        wanted: Rows of it that will be asked for, ascending.
        tokens: Which positions count, `"answer"` or `"all"`.
    """

    def __init__(
        self,
        folder: Path | None,
        key: Sequence,
        aligned: Sequence[int],
        dataset: Dataset,
        wanted: Sequence[int],
        tokens: str,
    ):
        self._folder, self._aligned, self._dataset, self._tokens = folder, list(aligned), dataset, tokens
        # Files of one number of rows: processes that each fill one run as many batches, which sharded weights need.
        starts = range(0, len(wanted), ROWS_A_FILE)
        parts = [wanted[max(0, min(start, len(wanted) - ROWS_A_FILE)) :][:ROWS_A_FILE] for start in starts]
        # Row numbers, tokens that count, and file name of each part.
        self._parts: list[list[int]] = []
        self._counted: list[int] = []
        self._names: list[str] = []
        self._place: dict[int, tuple[int, int]] = {}
        for number, part in enumerate(parts):
            # Rows of like length share a batch, so that little of it is padding.
            part = sorted(part, key=lambda index: len(dataset[index]["input_ids"]))
            rows = [dataset[index] for index in part]
            self._parts.append(part)
            self._counted.append(sum(len(row["input_ids"]) - first_counted(row, tokens) for row in rows))
            self._place.update({index: (number, position) for position, index in enumerate(part)})
            content = [(row["input_ids"], row["answer_start"]) for row in rows]
            text = json.dumps([*key, self._aligned, tokens, content], default=str)
            self._names.append(f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors")
        # Parts that are in memory, or open.
        self._readers: dict[int, FeatureRows] = {}

    def values(self, parts: Sequence[int] | None = None) -> int:
        """How many tokens, times aligned blocks, all parts hold, or those named."""
        parts = range(len(self._parts)) if parts is None else parts
        return sum(self._counted[number] for number in parts) * len(self._aligned)

    def missing(self) -> list[int]:
        """Numbers of the parts that nobody has computed yet."""
        if self._folder is None:
            return [number for number in range(len(self._parts)) if number not in self._readers]
        return [number for number in range(len(self._parts)) if not self._opens(number)]

    def first_found(self, missing: Sequence[int]) -> int | None:
        """A row of a part that was there before, unless all parts are among the missing ones."""
        found = [part[0] for number, part in enumerate(self._parts) if number not in missing]
        return found[0] if found else None

    def _opens(self, number: int) -> bool:
        """Open a part's file, which stays readable then, whoever deletes it; not one that a copy or a disk cut."""
        path = self._folder / self._names[number]
        if not path.exists():
            return False
        try:
            self._readers[number] = FeatureRows(path, self._aligned)
        except SafetensorError:
            return False
        return True

    def fill(
        self,
        run: ReadFeatures,
        missing: Sequence[int],
        pad_token_id: int,
        batch_size: int,
        device: torch.device,
        process: int,
        num_processes: int,
        desc: str,
    ) -> None:
        """Compute this process's share of the missing parts; every process runs as many batches as the others.

        Args:
            run: What computes features.
            missing: The same list in every process.
            pad_token_id, batch_size, device: How to make the batches.
            process, num_processes: Which of how many processes this is.
            desc: What the progress bar says.
        """
        for start in tqdm(range(0, len(missing), num_processes), desc=desc, unit="part"):
            number = missing[min(start + process, len(missing) - 1)]
            rows = [self._dataset[index] for index in self._parts[number]]
            features = row_features(run, batches(rows, self._tokens, pad_token_id, batch_size), self._aligned, device)
            if start + process >= len(missing):
                continue
            if self._folder is None:
                self._readers[number] = FeatureRows(features, self._aligned)
            else:
                save_whole(features, self._folder / self._names[number])

    def compute(self, index: int, run: ReadFeatures, pad_token_id: int, device: torch.device) -> list[torch.Tensor]:
        """What `rows` gives for one row, from the model."""
        batch = batches([self._dataset[index]], self._tokens, pad_token_id, 1)
        return FeatureRows(row_features(run, batch, self._aligned, device), self._aligned).row(0)

    def rows(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Features of these rows' counted tokens, one row after the other, `[n, hidden]` a block."""
        return join([self._row(*self._place[index]) for index in indices])

    def _row(self, number: int, position: int) -> list[torch.Tensor]:
        if number not in self._readers:
            self._readers[number] = FeatureRows(self._folder / self._names[number], self._aligned)
        return self._readers[number].row(position)


def has_room_for(size: int, missing: int, folder: Path | None, limit_gb: float, or_not: bool) -> bool:
    """Whether caches may take so much.

    Args:
        size: In bytes.
        missing: What of it is still to be written.
        folder: Where they would lie; `None` is memory. It is made where it is missing.
        limit_gb: The most that they may take, in GB (10⁹ bytes); on disk what is missing also may take no more than
            half of what is free.
        or_not: Whether the answer may be no.

    Raises:
        ValueError: It may not be no, and there is no room.
    """
    where, free = "memory", math.inf
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        where, free = str(folder), shutil.disk_usage(folder).free
    if size <= limit_gb * 1e9 and missing <= free / 2:
        return True
    wanted = f"{size / 1e9:.2g} GB in {where}, {missing / 1e9:.2g} GB of it new"
    allowed = f"reference_cache_gb={limit_gb} and half of the {free / 1e9:.2g} GB that are free allow"
    if not or_not:
        raise ValueError(
            f"reference_cache: the features would take {wanted}, more than {allowed}; raise reference_cache_gb, make "
            "room, or use 'off'."
        )
    logger.warning(f"Reference features would take {wanted}, more than {allowed}, so each step computes them anew.")
    return False
