"""Names that MLlib and torch define, kept as data so that a config is checked without importing either.

tests/config/test_catalog.py holds each list against the library's own classes.
"""

_TREE = (
    "cacheNodeIds",
    "checkpointInterval",
    "impurity",
    "maxBins",
    "maxDepth",
    "maxMemoryInMB",
    "minInfoGain",
    "minInstancesPerNode",
    "minWeightFractionPerNode",
    "seed",
)
_FOREST = (*_TREE, "bootstrap", "featureSubsetStrategy", "numTrees", "subsamplingRate")
_BOOSTED = (
    *_TREE,
    "featureSubsetStrategy",
    "lossType",
    "maxIter",
    "stepSize",
    "subsamplingRate",
    "validationTol",
)
_LINEAR = (
    "aggregationDepth",
    "fitIntercept",
    "maxBlockSizeInMB",
    "maxIter",
    "regParam",
    "standardization",
    "tol",
)
_FACTORS = (
    "factorSize",
    "fitIntercept",
    "fitLinear",
    "initStd",
    "maxIter",
    "miniBatchFraction",
    "regParam",
    "seed",
    "solver",
    "stepSize",
    "tol",
)

# Parameters that name columns, set by Headrace itself, are left out.
ESTIMATORS: dict[str, tuple[str, ...]] = {
    "AFTSurvivalRegression": (
        "aggregationDepth",
        "fitIntercept",
        "maxBlockSizeInMB",
        "maxIter",
        "quantileProbabilities",
        "tol",
    ),
    "ALS": (
        "alpha",
        "blockSize",
        "checkpointInterval",
        "finalStorageLevel",
        "implicitPrefs",
        "intermediateStorageLevel",
        "maxIter",
        "nonnegative",
        "numItemBlocks",
        "numUserBlocks",
        "rank",
        "regParam",
        "seed",
    ),
    "BisectingKMeans": ("distanceMeasure", "k", "maxIter", "minDivisibleClusterSize", "seed"),
    "DecisionTreeClassifier": (*_TREE, "thresholds"),
    "DecisionTreeRegressor": _TREE,
    "FMClassifier": (*_FACTORS, "thresholds"),
    "FMRegressor": _FACTORS,
    "GBTClassifier": (*_BOOSTED, "thresholds"),
    "GBTRegressor": _BOOSTED,
    "GaussianMixture": ("aggregationDepth", "k", "maxIter", "seed", "tol"),
    "GeneralizedLinearRegression": (
        "aggregationDepth",
        "family",
        "fitIntercept",
        "link",
        "linkPower",
        "maxIter",
        "regParam",
        "solver",
        "tol",
        "variancePower",
    ),
    "IsotonicRegression": ("featureIndex", "isotonic"),
    "KMeans": (
        "distanceMeasure",
        "initMode",
        "initSteps",
        "k",
        "maxBlockSizeInMB",
        "maxIter",
        "seed",
        "solver",
        "tol",
    ),
    "LDA": (
        "checkpointInterval",
        "docConcentration",
        "k",
        "keepLastCheckpoint",
        "learningDecay",
        "learningOffset",
        "maxIter",
        "optimizeDocConcentration",
        "optimizer",
        "seed",
        "subsamplingRate",
        "topicConcentration",
    ),
    "LinearRegression": (*_LINEAR, "elasticNetParam", "epsilon", "loss", "solver"),
    "LinearSVC": (*_LINEAR, "threshold"),
    "LogisticRegression": (
        *_LINEAR,
        "elasticNetParam",
        "family",
        "lowerBoundsOnCoefficients",
        "lowerBoundsOnIntercepts",
        "threshold",
        "thresholds",
        "upperBoundsOnCoefficients",
        "upperBoundsOnIntercepts",
    ),
    "MultilayerPerceptronClassifier": (
        "blockSize",
        "initialWeights",
        "layers",
        "maxIter",
        "seed",
        "solver",
        "stepSize",
        "thresholds",
        "tol",
    ),
    "NaiveBayes": ("modelType", "smoothing", "thresholds"),
    "RandomForestClassifier": (*_FOREST, "thresholds"),
    "RandomForestRegressor": _FOREST,
}

BINARY_ESTIMATORS = frozenset({"FMClassifier", "GBTClassifier", "LinearSVC"})
UNWEIGHTED = frozenset({"FMClassifier", "MultilayerPerceptronClassifier"})  # classifiers that take no weights of rows
REGRESSORS = frozenset(name for name in ESTIMATORS if name.endswith(("ALS", "Regressor", "Regression"))) - {
    "LogisticRegression"
}
CLUSTERERS = frozenset({"BisectingKMeans", "GaussianMixture", "KMeans", "LDA"})  # they take no label
SURVIVAL = frozenset({"AFTSurvivalRegression"})
ESTIMATORS_OF: dict[str, frozenset[str]] = {  # by the kind of label that they learn
    "binary": frozenset(ESTIMATORS) - REGRESSORS - CLUSTERERS,
    "multiclass": frozenset(ESTIMATORS) - REGRESSORS - CLUSTERERS,
    "multilabel": frozenset(),
    "real": REGRESSORS - SURVIVAL,
    "count": REGRESSORS - SURVIVAL,
    "survival": SURVIVAL,
    "next_token": frozenset(),
    "none": CLUSTERERS,
}
TREES = frozenset(name for name in ESTIMATORS if name.startswith(("DecisionTree", "GBT", "RandomForest")))

# Optimizers of torch.optim that take a step without a closure, with the parameters a config may set.
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "Adadelta": ("rho", "eps", "weight_decay"),
    "Adafactor": ("beta2_decay", "eps", "d", "weight_decay"),
    "Adagrad": ("lr_decay", "weight_decay", "initial_accumulator_value", "eps"),
    "Adam": ("betas", "eps", "weight_decay", "amsgrad", "decoupled_weight_decay"),
    "AdamW": ("betas", "eps", "weight_decay", "amsgrad"),
    "Adamax": ("betas", "eps", "weight_decay"),
    "NAdam": ("betas", "eps", "weight_decay", "momentum_decay", "decoupled_weight_decay"),
    "RAdam": ("betas", "eps", "weight_decay", "decoupled_weight_decay"),
    "RMSprop": ("alpha", "eps", "weight_decay", "momentum", "centered"),
    "SGD": ("momentum", "dampening", "weight_decay", "nesterov"),
}

# Schedules of torch.optim.lr_scheduler, with the parameters a config may set.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "ConstantLR": ("factor", "total_iters"),
    "CosineAnnealingLR": ("T_max", "eta_min"),
    "CosineAnnealingWarmRestarts": ("T_0", "T_mult", "eta_min"),
    "CyclicLR": ("base_lr", "max_lr", "step_size_up", "step_size_down", "mode", "gamma", "cycle_momentum"),
    "ExponentialLR": ("gamma",),
    "LinearLR": ("start_factor", "end_factor", "total_iters"),
    "MultiStepLR": ("milestones", "gamma"),
    "OneCycleLR": (
        "max_lr",
        "total_steps",
        "pct_start",
        "anneal_strategy",
        "div_factor",
        "final_div_factor",
        "cycle_momentum",
    ),
    "PolynomialLR": ("total_iters", "power"),
    "StepLR": ("step_size", "gamma"),
}

# The built-in networks with the constructor parameters that a config may set.
NETWORKS: dict[str, tuple[str, ...]] = {
    "cnn": ("channels", "hidden", "dropout"),
    "deep_and_cross": ("embedding_dim", "embedding_std", "cross_layers", "hidden", "dropout"),
    "dlrm": ("embedding_dim", "embedding_std", "bottom", "hidden", "dropout"),
    "gpt": ("layers", "heads", "width", "dropout"),
    "mlp": ("embedding_dim", "hidden", "dropout"),
    "softmax": (),
    "two_tower": ("user", "item", "embedding_dim", "embedding_std", "hidden", "width", "temperature", "dropout"),
}

DECODERS = frozenset({"gpt"})  # they learn what comes next in a sequence, and nothing else

SOURCE_OPTIONS: dict[str, tuple[str, ...]] = {
    "csv": (
        "dateFormat",
        "escape",
        "header",
        "ignoreLeadingWhiteSpace",
        "ignoreTrailingWhiteSpace",
        "nullValue",
        "quote",
        "sep",
        "timestampFormat",
    ),
    "delta": ("version",),
    "idx": (),
    "libsvm": (),
    "parquet": (),
    "text": ("block_chars",),
}
