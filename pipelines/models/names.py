"""Where a network's class is, by its name in the config. No torch here: other stages read it too."""

_BUILT_IN = {
    "softmax": "pipelines.models.softmax:Softmax",
    "mlp": "pipelines.models.mlp:MLP",
    "cnn": "pipelines.models.cnn:CNN",
    "gpt": "pipelines.models.gpt:GPT",
    "dlrm": "pipelines.models.dlrm:DLRM",
    "two_tower": "pipelines.models.two_tower:TwoTower",
    "deep_and_cross": "pipelines.models.deep_and_cross:DeepAndCross",
}


def network_path(name: str) -> str:
    """`module:Class` of a built-in network, or the path itself."""
    return _BUILT_IN.get(name, name)
