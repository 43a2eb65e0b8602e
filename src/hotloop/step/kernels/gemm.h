// Matrix products of float32 matrices with what follows them done while the result is in registers or L1:
// bias and relu, relu's backward mask, or the whole optimizer update of a weight whose gradient the
// product is. Results do not depend on the number of threads: every sum is taken in one order.
#pragma once

#include <cstdint>

extern "C" {

// Scalars of one update; formulas are those of torch.optim's single-tensor functions.
struct hotloop_update {
  int32_t kind;  // 0 sgd, 1 momentum, 2 nesterov, 3 adam, 4 adamw, 5 rmsprop, 6 adagrad
  int32_t first_step;
  double lr, beta1, beta2, eps, weight_decay, bias_correction1, bias_correction2_sqrt;
  double momentum, dampening, alpha;
};

// C[M,N] = A[M,K] B[K,N] (+ bias[N]); act 1: relu; mask: C where mask > 0, else 0. Strides are in
// elements; C's columns are adjacent.
void hotloop_gemm_f32(int64_t M, int64_t N, int64_t K, const float* A, int64_t a_rs, int64_t a_cs,
                      const float* B, int64_t b_rs, int64_t b_cs, float* C, int64_t c_rs,
                      const float* bias, int32_t act, const float* mask, int64_t mask_rs,
                      int32_t num_threads);

// Updates W[M,N] and its states by the gradient scale * A B, which is never written to memory
// (but to G, rows s_rs apart like the states', where G is not null).
void hotloop_gemm_update_f32(int64_t M, int64_t N, int64_t K, const float* A, int64_t a_rs,
                             int64_t a_cs, const float* B, int64_t b_rs, int64_t b_cs, float* W,
                             int64_t w_rs, float* s1, float* s2, int64_t s_rs, float* G,
                             const hotloop_update* u, float scale, int32_t num_threads);

// The same two with A and B rounded to bfloat16 and summed in float32; only where the processor has
// an instruction for it, which hotloop_has_bf16 tells.
int32_t hotloop_has_bf16();
void hotloop_gemm_bf16(int64_t M, int64_t N, int64_t K, const float* A, int64_t a_rs, int64_t a_cs,
                       const float* B, int64_t b_rs, int64_t b_cs, float* C, int64_t c_rs,
                       const float* bias, int32_t act, const float* mask, int64_t mask_rs,
                       int32_t num_threads);
void hotloop_gemm_update_bf16(int64_t M, int64_t N, int64_t K, const float* A, int64_t a_rs,
                              int64_t a_cs, const float* B, int64_t b_rs, int64_t b_cs, float* W,
                              int64_t w_rs, float* s1, float* s2, int64_t s_rs, float* G,
                              const hotloop_update* u, float scale, int32_t num_threads);

// The same update by a gradient that lies in memory, n adjacent elements.
void hotloop_update_f32(int64_t n, float* w, const float* g, float* s1, float* s2,
                        const hotloop_update* u, float scale, int32_t num_threads);

// Pooling of x [N, C, H, W] over windows [kh, kw] next to each other; strides of x, or of its gradient,
// in elements. last: the results have their channels adjacent.
struct hotloop_pool_shape {
  int64_t N, C, H, W, kh, kw, relu, last, n_stride, c_stride, h_stride, w_stride;
};

// The place of a result that relu has cut off.
constexpr uint8_t kNowhere = 255;

void hotloop_pool_f32(const hotloop_pool_shape* shape, const float* x, float* out, uint8_t* places,
                      int32_t num_threads);
void hotloop_pool_backward_f32(const hotloop_pool_shape* shape, const float* gradient,
                               const int64_t* g_strides, const uint8_t* places, float* gx,
                               int32_t num_threads);

// Convolution of x [N, C, H, W] with filters w [O, C, 3, 3], stride 1. Strides in elements, at their
// end the letter of the dimension (of w: o, i, h, w); channels of x, of results and of their
// gradient g [N, O, OH, OW] are adjacent. Of pooled results the strides are those of [N, O, OH / 2, OW /
// 2], whose channels may lie oc or gc apart.
struct hotloop_conv_shape {
  int64_t N, C, H, W, O, pad_h, pad_w, relu;
  int64_t xn, xh, xw, wo, wi, wh, ww, on, oc, oh, ow, gn, gc, gh, gw;
};

// out = x * w (+ bias); relu where asked; with places: pooled by 2x2, and a byte for each that says which of
// its window it is (as hotloop_pool_f32).
void hotloop_conv3x3_f32(const hotloop_conv_shape* s, const float* x, const float* w,
                         const float* bias, float* out, uint8_t* places, int32_t num_threads);
// The gradient of x from g, or from that of pooled results and their places; 0 where mask, laid
// out as x, is not above 0.
void hotloop_conv3x3_input_gradient_f32(const hotloop_conv_shape* s, const float* g,
                                        const uint8_t* places, const float* w, const float* mask,
                                        float* gx, int32_t num_threads);
// The gradient of w, and of the bias.
void hotloop_conv3x3_weight_gradient_f32(const hotloop_conv_shape* s, const float* x,
                                         const float* g, const uint8_t* places, float* gw,
                                         float* gb, int32_t num_threads);
}
