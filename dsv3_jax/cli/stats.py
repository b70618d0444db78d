"""`dsv3 stats RUN`: count which experts held-out text is routed to."""

from dsv3_jax.cli.common import parse


def run(argv: list[str]) -> int:
    """Write the report; print a line for each layer and a sentence on each other measurement."""
    from dsv3_jax.report.progress import text_console, track
    from dsv3_jax.stats.page import findings
    from dsv3_jax.stats.reporting import PAGE, Stats, report

    args = parse(Stats, argv, "stats")
    folder, numbers = report(args.run, args.out, args, follow=track)
    console = text_console()
    console.print(
        f"{max(numbers['tokens']):,} tokens of {sum(numbers['documents'].values())} documents"
    )

    # A line for each layer.
    known = numbers["information"]
    for i, layer in enumerate(numbers["layers"]):
        line = f"{layer:10s} MaxVio {numbers['max_vio'][i]:.2f}"
        if len(numbers["domains"]) > 1:
            bits, low, high = (known[key][i] for key in ("domain", "domain_low", "domain_high"))
            line += (
                f"  I(expert; domain) less chance {bits:.4f} bits (95 %: {low:.4f} to {high:.4f})"
            )
        console.print(line)

    for sentence in findings(numbers).values():
        console.print(sentence)
    if args.tokens is not None:
        console.print(f"tokens: {args.tokens}")
    console.print(f"the page: {folder / PAGE}")
    return 0
