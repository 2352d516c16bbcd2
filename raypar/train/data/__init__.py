"""Reading a user's data: what may be passed, how it repeats, and where a run stands in it.

`opening.py` takes what a user passed; `batches.py` makes batches of samples (`samples.py` by index,
`sample_stream.py` one by one, `ray_data.py` from Ray; `pad.py` brings them to one length);
`stream.py` goes through batches pass by pass; `position.py` is what a checkpoint keeps. How batches
reach the ranks is `raypar.train.feed`.
"""

from raypar.train.data.batches import batches
from raypar.train.data.convert import converted
from raypar.train.data.form import BatchForm, plain
from raypar.train.data.join import joined
from raypar.train.data.opening import Data, Opened, open_data, peek
from raypar.train.data.pad import PadTo
from raypar.train.data.position import DataPosition
from raypar.train.data.randomness import RandomState
from raypar.train.data.samples import SampledBatches
from raypar.train.data.stream import all_epochs

__all__ = [
    "BatchForm",
    "Data",
    "DataPosition",
    "Opened",
    "PadTo",
    "RandomState",
    "SampledBatches",
    "all_epochs",
    "batches",
    "converted",
    "joined",
    "open_data",
    "peek",
    "plain",
]
