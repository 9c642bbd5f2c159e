"""Rows of tensors: small data sets that stages hand on, in Parquet files that anything reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TensorRows:
    """Named tensors (N, ...) of the same N; ``rows[[0, 5]]`` is a batch. A stage that returns one leaves a data set."""

    columns: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        index = torch.as_tensor(positions)
        return {name: column[index] for name, column in self.columns.items()}

    def select(self, positions: Tensor) -> TensorRows:
        """The rows at ``positions``: numbers, or a mask (N,)."""
        return TensorRows({name: column[positions] for name, column in self.columns.items()})

    def to_parquet(self, file: Path) -> None:
        """Write the rows, bit for bit; columns with more than one number a row become lists."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        arrays, shapes = {}, {}
        for name, column in self.columns.items():
            shapes[name] = list(column.shape[1:])
            flat = pa.array(column.detach().cpu().contiguous().flatten().numpy())
            width = column[0].numel() if len(column) else 1
            arrays[name] = pa.FixedSizeListArray.from_arrays(flat, width) if shapes[name] else flat
        pq.write_table(pa.table(arrays).replace_schema_metadata({"shapes": json.dumps(shapes)}), file)

    @staticmethod
    def read(file: Path) -> TensorRows:
        """What `to_parquet` wrote."""
        import pyarrow.parquet as pq

        table = pq.read_table(file)
        shapes = json.loads(table.schema.metadata[b"shapes"])
        columns = {}
        for name, shape in shapes.items():
            array = table.column(name).combine_chunks()
            flat = torch.from_numpy((array.flatten() if shape else array).to_numpy(zero_copy_only=False).copy())
            columns[name] = flat.view(len(table), *shape)
        return TensorRows(columns)
