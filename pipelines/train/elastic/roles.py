"""Which class a rank is of, by strategy."""

from pipelines.config.strategies import Gossip, Strategy
from pipelines.train.elastic.client import Client
from pipelines.train.elastic.gossip import GossipChief, GossipWorker
from pipelines.train.elastic.lead import LeadServer


def chief_of(strategy: Strategy) -> type[GossipChief] | type[LeadServer]:
    """Rank 0's."""
    return GossipChief if isinstance(strategy, Gossip) else LeadServer


def worker_of(strategy: Strategy) -> type[GossipWorker] | type[Client]:
    """That of ranks that train."""
    return GossipWorker if isinstance(strategy, Gossip) else Client
