// Functions that attention.py calls, by the `Sizes`, `Forward` and `Backward` of the file that includes this at its end.

extern "C" {

// Causal attention O = softmax(Q K^T / sqrt(E)) V, and log2 of the softmax normalizers in `log_sums` (B, H, T). Returns
// whether the workspace could be allocated.
int32_t minillama_attention(int32_t batch, int32_t heads, int32_t kv_heads, int32_t tokens, int32_t width,
                            int32_t threads, const Tensor* q, const Tensor* k, const Tensor* v, const Tensor* o,
                            float* log_sums) {
    int group = heads / kv_heads;
    return over_heads<Forward>(batch, kv_heads, threads, Sizes(tokens, width), [&](Forward& pass, int b, int shared) {
        pass.load_keys(*k, *v, b, shared);
        for (int h = shared * group; h < (shared + 1) * group; h++)
            pass.run(*q, *o, log_sums + (size_t(b) * heads + h) * tokens, b, h);
    });
}

// Gradients with respect to Q, K and V from `grad`, that with respect to O. Returns the same.
int32_t minillama_attention_backward(int32_t batch, int32_t heads, int32_t kv_heads, int32_t tokens, int32_t width,
                                     int32_t threads, const Tensor* q, const Tensor* k, const Tensor* v,
                                     const Tensor* o, const float* log_sums, const Tensor* grad, const Tensor* grad_q,
                                     const Tensor* grad_k, const Tensor* grad_v) {
    int group = heads / kv_heads;
    return over_heads<Backward>(batch, kv_heads, threads, Sizes(tokens, width), [&](Backward& pass, int b, int shared) {
        pass.load_keys(*k, *v, b, shared);
        for (int h = shared * group; h < (shared + 1) * group; h++) {
            pass.load_queries(*q, *o, *grad, log_sums + (size_t(b) * heads + h) * tokens, b, h);
            pass.run();
            pass.write_queries(*grad_q, b, h);
        }
        pass.write_keys(*grad_k, *grad_v, b, shared);
    });
}
}
