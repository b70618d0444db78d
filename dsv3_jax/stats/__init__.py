"""Routing statistics of a model on text: counts, their measures, and a page that draws them."""

from dsv3_jax.stats.bits import Information, information
from dsv3_jax.stats.flow import repeats, transition_lift, transitions
from dsv3_jax.stats.knockouts import Worth, worth
from dsv3_jax.stats.measures import (
    Specialisation,
    domain_preference,
    favourites,
    lift,
    mutual_information,
    specialisation,
)
from dsv3_jax.stats.others import agreement, match_experts, saturation
from dsv3_jax.stats.reading import LoadLog, read_load
from dsv3_jax.stats.reporting import Report, ReportOptions, report
from dsv3_jax.stats.routing_stats import BiasWork, RoutingStats, collect, tokens
from dsv3_jax.stats.token_rows import TokenRows, context, find_contexts, readable
