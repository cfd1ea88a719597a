"""Symbolic tracing by ``torch.fx``: what cannot be traced becomes one node of the graph."""

from collections.abc import Callable

from torch import fx, nn


def tracer_of(*values) -> fx.Tracer | None:
    """The tracer that traces now, by what arrives at a module; None outside of tracing."""
    for value in values:
        if isinstance(value, (tuple, list)):
            found = tracer_of(*value)
        elif isinstance(value, dict):
            found = tracer_of(*value.values())
        else:
            found = value.tracer if isinstance(value, fx.Proxy) else None
        if found is not None:
            return found
    return None


def call(tracer: fx.Tracer, function: Callable, module: nn.Module, *args) -> fx.Proxy:
    """A node that calls ``function(module, *args)`` when the graph runs.

    Args:
        tracer: what traces.
        function: of a module's top level, so that a graph can be pickled.
        module: inside of what is traced; the graph's own, so that copies are whole.
        *args: proxies, and plain values, in tuples and dictionaries.

    Raises:
        ValueError: if ``module`` is outside of what is traced.
    """
    path = next((path for path, found in tracer.root.named_modules() if found is module), None)
    if path is None:
        raise ValueError(
            f"torch.fx traces a part of a model, {type(tracer.root).__name__}, that does not have "
            "the selectors: trace the model to which they are attached"
        )
    own = tracer.create_proxy("get_attr", path, (), {})
    return tracer.create_proxy("call_function", function, (own, *args), {})
