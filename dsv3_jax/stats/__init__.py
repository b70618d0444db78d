"""Where a model's tokens go: counts of routing over text, measures of them, their pictures, and a page of all."""

from dsv3_jax.stats.collect import RoutingStats, collect
from dsv3_jax.stats.measures import (
    Specialisation,
    favourites,
    lift,
    mutual_information,
    permuted_information,
    specialisation,
)
from dsv3_jax.stats.reporting import read_load, report
from dsv3_jax.stats.tokens import context, readable
