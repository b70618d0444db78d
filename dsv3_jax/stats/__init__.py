"""Routing statistics of a model on text: counts, measures of these counts, pictures, and a page."""

from dsv3_jax.stats.measures import (
    Specialisation,
    domain_preference,
    favourites,
    lift,
    mutual_information,
    permuted_information,
    specialisation,
)
from dsv3_jax.stats.reporting import read_load, report
from dsv3_jax.stats.routing_stats import RoutingStats, collect
from dsv3_jax.stats.tokens import context, readable
