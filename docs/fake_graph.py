"""CUDA graphs without a GPU, for tests: operations are recorded and run again on the same tensors.

Like a CUDA graph, a replay runs no Python: numbers keep their values, tensors their memory, and
random numbers follow from the seed at the time of the replay. What waits for the GPU or reads the
host's memory cannot be recorded. Unlike in CUDA, recording computes, so the first replay is empty.
"""
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REFUSED = ["aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
           "aten::lift_fresh", "aten::is_nonzero"]


class CUDAGraph:
    def __init__(self):
        self.operations = []
        self.computed = False

    def replay(self):
        if self.computed:
            self.computed = False
            return

        with torch.no_grad():
            for function, args, kwargs, results in self.operations:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(results), tree_leaves(again)):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class graph(TorchDispatchMode):
    def __init__(self, cuda_graph: CUDAGraph, stream=None):
        super().__init__()
        self.cuda_graph = cuda_graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = function._schema
        if schema.name in REFUSED:
            raise RuntimeError(f"{schema.name} while a graph is recorded")

        results = function(*args, **kwargs)
        aliases = [x.alias_info for x in schema.returns]
        if not any(x and not x.is_write for x in aliases):       # views need no replay
            self.cuda_graph.operations.append((function, args, kwargs, results))
        return results

    def __exit__(self, *error):
        self.cuda_graph.computed = True
        return super().__exit__(*error)
