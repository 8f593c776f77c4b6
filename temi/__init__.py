"""Group images without labels: TEMI on features of pretrained backbones."""

import lazy_loader

# Names are imported when they are first used, so that `import temi` itself takes no time.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["backbones", "costs", "distributed", "embeddings", "files", "plots", "trouble"],
    submod_attrs={
        "backbones": ["load_backbone"],
        "baselines": ["kmeans"],
        "config": ["RECIPES", "RunOptions", "TrainConfig"],
        "costs": ["estimate_costs"],
        "data": ["ImageSet", "load_images"],
        "cache": ["embed", "embed_shard", "load_cached"],
        "embeddings": ["Features", "load_features"],
        "ensemble": ["agreement_between_heads", "align_heads", "loss_weights", "vote"],
        "estimator": ["TEMI"],
        "export": ["assignments", "centers", "sort_images", "write_assignments"],
        "files": ["results_file"],
        "gallery": ["write_gallery"],
        "heads": ["MultiHead"],
        "losses": ["temi_loss"],
        "metrics": [
            "class_recall",
            "cluster_statistics",
            "confidence_interval",
            "coverage_curve",
            "evaluate",
            "learnability",
            "match_clusters",
            "matched_counts",
            "neighbor_information",
            "purity",
            "silhouette",
            "stability",
        ],
        "maps": ["map_points"],
        "names": ["apply_names"],
        "neighbors": [
            "approximate_neighbors",
            "mutual_neighbors",
            "near_duplicates",
            "nearest_neighbors",
        ],
        "overview": ["list_runs", "summary"],
        "parameters": ["JobConfig", "is_default", "read_parameters"],
        "prediction": ["predict_images"],
        "rundirs": ["plan_run"],
        "runs": ["Run", "load_run"],
        "selection": ["SuggestedClusters", "suggest_num_clusters"],
        "training": ["train"],
    },
)
