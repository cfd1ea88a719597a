"""Symbolic tracing by ``torch.fx``: code that cannot be traced becomes one node of the graph."""

from collections.abc import Callable
from typing import Any

from torch import fx, nn


def tracer_of(*values: Any) -> fx.Tracer | None:
    """The tracer of proxies among the arguments of a module; None outside of tracing."""
    for value in values:
        found: Any = None
        if isinstance(value, (tuple, list)):
            found = tracer_of(*value)
        elif isinstance(value, dict):
            found = tracer_of(*value.values())
        elif isinstance(value, fx.Proxy):
            found = value.tracer
        if found is not None:
            tracer: fx.Tracer = found
            return tracer
    return None


def call(tracer: fx.Tracer, function: Callable[..., Any], module: nn.Module, *args: Any) -> Any:
    """A node that calls ``function(module, *args)`` when the graph runs.

    Args:
        tracer: of the graph.
        function: at the top level of a Python module, so that the graph can be pickled.
        module: inside the traced model; the graph has its own copy of it.
        *args: proxies and plain values, in tuples and dictionaries.

    Returns:
        The proxy of what it returns.

    Raises:
        ValueError: if ``module`` is outside the traced model.
    """
    path = next((path for path, found in tracer.root.named_modules() if found is module), None)
    if path is None:
        raise ValueError(
            f"torch.fx traces a submodule, {type(tracer.root).__name__}, that does not have the "
            "selectors: trace the model to which they are attached"
        )
    own = tracer.create_proxy("get_attr", path, (), {})
    return tracer.create_proxy("call_function", function, (own, *args), {})
