"""The synthetic study of the corrector: what `python -m benchmarks.synthetic` sweeps over.

It has keys of its own and trains no retriever: there are no texts, only embeddings that drift.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Width x staleness x pairs; some minutes on two cores."""
    c = ConfigDict()
    c.seeds = 3  # corpora, drifts and correctors
    c.targets = 5000  # N
    c.held_out = 1000  # of these, never among the pairs
    c.dim = 32  # D
    c.clusters = 50  # of the Gaussian mixture that targets come from
    c.spread = 0.5  # standard deviation within a cluster, by that of the centers
    c.queries = 128  # Q, on either side of held out
    c.beta = 20.0  # inverse temperature
    c.widths = (0, 8, 32, 128)  # H of the mlp; 0 = the linear corrector
    c.strengths = (0.1, 0.3, 1.0)  # s of the drift: radians of the rotation, among others
    c.unpredictable = 0.2  # part of the drift that is no function of the stale row, by s
    c.pairs = (32, 128, 512, 2048, 8192)
    c.steps = 1000  # of Adam, learning rate falling to 0
    c.batch_size = 256
    c.learning_rate = 3e-3
    return c
