"""Routing statistics of a model on text: counts, measures of these counts, pictures, and a page."""

from dsv3_jax.stats.bits import Information, information
from dsv3_jax.stats.compare import agreement, match_experts
from dsv3_jax.stats.flow import repeats, transition_lift, transitions
from dsv3_jax.stats.knockouts import Worth, worth
from dsv3_jax.stats.load_log import LoadLog, read_load
from dsv3_jax.stats.measures import (
    Specialisation,
    domain_preference,
    favourites,
    lift,
    mutual_information,
    permuted_information,
    specialisation,
)
from dsv3_jax.stats.others import saturation
from dsv3_jax.stats.reporting import Report, report
from dsv3_jax.stats.routing_stats import BiasWork, RoutingStats, collect, tokens
from dsv3_jax.stats.text import context, readable
from dsv3_jax.stats.token_rows import TokenRows, write_parquet
