"""stub"""
def blocks_to_recompute(args, model):
    return args.recompute or 0
