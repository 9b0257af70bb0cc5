"""Runs a bmodel in the chip's simulator as a board runs it: the vision encoder, the prompt, then
token by token with a cache of keys and values.

    run_bmodel.py BMODEL PYTHON_MODULES REQUEST.npz RESULT.npz

REQUEST: `tokens` int32 [n], the prompt; `forced` int32 [steps], what is fed after it whatever the
model says; `positions` int32 [1 or 3, n + steps]. With an image also `pixels` float32 [patches,
features], `patch_positions` int32 [patches, 2] and `image_rows` int64, where its tokens stand in
the prompt. `embeddings` float32 [n + steps, hidden] where the bmodel has no embedding.
RESULT: `vision` [tokens, hidden]; `layer_I` float32 [n + steps, hidden], what each layer gives (the
last one's with the final norm); `tokens` int32 [1 + steps].
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from typing import Any

import numpy

# Added to the score of what a token must not see; as large as both 16-bit types can hold.
UNSEEN = -10000.0


class Simulator:
    """A loaded bmodel. Every call of a net counts, for the progress."""

    def __init__(self, path: str, modules: str, calls: int) -> None:
        sys.path.insert(0, modules)
        runtime = importlib.import_module("pyruntime_bm")
        # The runtime looks this library up by name while it loads a model.
        self._library = ctypes.CDLL("libcmodel.so")
        self._model = runtime.Model(path, 0, "")
        self.names = list(self._model.networks)
        self._nets: dict[str, Any] = {}
        self._done, self._calls = 0, calls

    def net(self, name: str) -> Any:
        if name not in self._nets:
            self._nets[name] = self._model.Net(name)
        return self._nets[name]

    def shape(self, name: str, number: int) -> tuple[int, ...]:
        """The shape of one input of a net."""
        return tuple(self.net(name).inputs[number].data.shape)

    def run(self, name: str, *values: Any) -> list[Any]:
        """What a net makes of its inputs, as float32 or int32. A mask, the third, is for those
        that take one: nets for prompts of any length have theirs built in."""
        net = self.net(name)
        if len(net.inputs) == 2:
            values = values[:2]
        if len(values) != len(net.inputs):
            raise SystemExit(f"net {name} takes {[each.name for each in net.inputs]}")
        for place, value in zip(net.inputs, values, strict=True):
            place.data[...] = stored(numpy.asarray(value).reshape(place.data.shape), place)
        net.forward_dynamic([list(place.data.shape) for place in net.inputs])
        self._done += 1
        print(f"qbuild {self._done} {self._calls}", flush=True)
        return [loaded(place) for place in net.outputs]


def stored(value: Any, place: Any) -> Any:
    """The bits in which a net takes a value."""
    if place.dtype == "bf16":
        bits = numpy.ascontiguousarray(value, "f4").view("u4")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("u2")
    if place.dtype == "f16":
        return value.astype("f2").view(place.data.dtype)
    return value.astype(place.data.dtype)


def loaded(place: Any) -> Any:
    """A net's output as numpy knows it; a copy."""
    if place.dtype == "bf16":
        return (place.data.astype("u4") << 16).view("f4")
    if place.dtype == "f16":
        return numpy.array(place.data).view("f2").astype("f4")
    return numpy.array(place.data)


def see_image(simulator: Simulator, request: Any) -> Any:
    """The image's tokens [patches / 4, hidden]; patches that it lacks are seen by none."""
    pixels, positions = request["pixels"], request["patch_positions"]
    room, count = simulator.shape("vit", 0)[0], len(pixels)
    if count > room:
        raise SystemExit(f"the image has {count} patches; the bmodel takes {room}")
    padded = numpy.zeros((room, pixels.shape[1]), "f4")
    padded[:count] = pixels
    places = numpy.zeros((room, 2), "i4")
    places[:count] = positions
    mask = numpy.full((room, room), UNSEEN, "f4")
    mask[:count, :count] = 0
    made = simulator.run("vit", padded, places, mask)[0]
    return made[: count * len(made) // room]


def embed(simulator: Simulator, request: Any, net: str, tokens: Any, first: int) -> Any:
    """The embeddings of some tokens, of which the first stands at `first` of all."""
    if "embeddings" in request:
        return request["embeddings"][first : first + len(tokens)]
    room = simulator.shape(net, 0)[-1]
    padded = numpy.zeros(room, "i4")
    padded[: len(tokens)] = tokens
    return simulator.run(net, padded)[0].reshape(room, -1)[: len(tokens)]


def choose(simulator: Simulator, hidden: Any) -> int:
    """The token that a last hidden state [hidden] leads to."""
    made = simulator.run("lm_head", hidden)[0]
    return int(made.reshape(-1).argmax() if made.size > 1 else made.reshape(-1)[0])


def main(path: str, modules: str, request_file: str, result_file: str) -> None:
    request = dict(numpy.load(request_file))
    tokens, forced, positions = (request[name] for name in ("tokens", "forced", "positions"))
    layers, count = int(request["layers"]), len(tokens)
    simulator = Simulator(path, modules, int(request["calls"]))
    result: dict[str, Any] = {}
    states = embed(simulator, request, "embedding", tokens, 0)
    if "pixels" in request:
        result["vision"] = see_image(simulator, request)
        states = states.copy()
        states[request["image_rows"]] = result["vision"]
    room = simulator.shape("block_0", 0)[1]
    if count > room:
        raise SystemExit(f"the prompt has {count} tokens; the bmodel takes {room}")
    keys, values = fill(simulator, states, positions[:, :count], layers, room, result)
    chosen = [choose(simulator, result[f"layer_{layers - 1}"][-1])]
    for step, token in enumerate(forced):
        state = embed(simulator, request, "embedding_cache", [token], count + step)
        place = positions[:, count + step : count + step + 1]
        go_on(simulator, state, place, keys, values, count + step, result)
        chosen.append(choose(simulator, result[f"layer_{layers - 1}"][-1]))
    result["tokens"] = numpy.array(chosen, "i4")
    numpy.savez(result_file, **result)


def fill(
    simulator: Simulator, states: Any, positions: Any, layers: int, room: int, result: Any
) -> tuple[list[Any], list[Any]]:
    """Run the prompt through all layers; gives the caches, as long as decoding wants them."""
    count, width = states.shape
    padded = numpy.zeros((1, room, width), "f4")
    padded[0, :count] = states
    places = numpy.zeros((len(positions), room), "i4")
    places[:, :count] = positions
    mask = numpy.triu(numpy.full((room, room), UNSEEN, "f4"), 1)
    mask[:, count:] = UNSEEN
    keys: list[Any] = []
    values: list[Any] = []
    for layer in range(layers):
        padded, key, value = simulator.run(f"block_{layer}", padded, places, mask)
        result[f"layer_{layer}"] = padded[0, :count]
        for cache, made in ((keys, key), (values, value)):
            history = numpy.zeros(simulator.shape(f"block_cache_{layer}", 3), "f4")
            history[:, :count] = made[:, :count]
            cache.append(history)
    return keys, values


def go_on(
    simulator: Simulator,
    state: Any,
    place: Any,
    keys: list[Any],
    values: list[Any],
    past: int,
    result: Any,
) -> None:
    """One token, of which `past` are cached, through all layers."""
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        mask = numpy.full(key.shape[1] + 1, UNSEEN, "f4")
        mask[:past] = mask[-1] = 0
        net = f"block_cache_{layer}"
        state, new_key, new_value = simulator.run(net, state, place, mask, key, value)
        key[:, past], value[:, past] = new_key[:, 0], new_value[:, 0]
        row = state.reshape(1, -1)
        result[f"layer_{layer}"] = numpy.concatenate([result[f"layer_{layer}"], row])


if __name__ == "__main__":
    main(*sys.argv[1:])
