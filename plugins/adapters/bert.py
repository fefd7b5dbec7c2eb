"""BERT and its relatives: BERT, RoBERTa and ELECTRA share one layout, DistilBERT has its own names."""

from recap_cli.api import Adapter, Heads, Neurons

EMBEDDINGS = ("*word_embeddings.*", "*position_embeddings.*", "*token_type_embeddings.*", "*embeddings_project.*")

BERT = Adapter(
    tables=(
        Heads(
            block="**encoder.layer.*",
            attention="attention.self",
            q="attention.self.query",
            k="attention.self.key",
            v="attention.self.value",
            out="attention.output.dense",
            head_dim="attention_head_size",
            count=("num_attention_heads",),
            width=("all_head_size",),
        ),
        Neurons(block="**encoder.layer.*", up=("intermediate.dense",), down="output.dense"),
    ),
    embeddings=EMBEDDINGS,
    # The pooler stands between encoder and classifier, and the checkpoint of a bare encoder may have none: part of the head.
    head=("classifier.*", "*.pooler.*"),
)

DISTILBERT = Adapter(
    tables=(
        Heads(
            block="**transformer.layer.*",
            attention="attention",
            q="attention.q_lin",
            k="attention.k_lin",
            v="attention.v_lin",
            out="attention.out_lin",
            head_dim="attention_head_size",
            count=("n_heads",),
        ),
        Neurons(block="**transformer.layer.*", up=("ffn.lin1",), down="ffn.lin2"),
    ),
    embeddings=EMBEDDINGS,
    head=("pre_classifier.*", "classifier.*"),
)
