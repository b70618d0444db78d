// Calls every C++ kernel with arrays of random shapes, without XLA or Python, for the compilers' sanitizers.
//
//   sanitized_kernels SEED FIRST SECONDS    cases from number FIRST on; prints "N name shape" before case N
//
// An array is allocated to its exact size, so an access outside it is reported, and begins at a random multiple of 4
// bytes, whereas XLA's begin at multiples of 64. A case runs on one thread and on several. The results must be finite
// and the same to the last bit. One of 100 numbers is 0, and one is large.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error *Dsv3SmallBatchMatmul(XLA_FFI_CallFrame*), *Dsv3SmallBatchSwiglu(XLA_FFI_CallFrame*),
    *Dsv3SmallBatchByHead(XLA_FFI_CallFrame*), *Dsv3DecodeExperts(XLA_FFI_CallFrame*),
    *Dsv3CachedAttention(XLA_FFI_CallFrame*), *Dsv3WriteRows(XLA_FFI_CallFrame*),
    *Dsv3ExpertsSwiglu(XLA_FFI_CallFrame*), *Dsv3ExpertsSwigluGradients(XLA_FFI_CallFrame*),
    *Dsv3CausalAttention(XLA_FFI_CallFrame*), *Dsv3CausalAttentionGradients(XLA_FFI_CallFrame*),
    *Dsv3Adamw(XLA_FFI_CallFrame*);
}

namespace {

constexpr int64_t kThreads = 3;
constexpr XLA_FFI_DataType kFloat = XLA_FFI_DataType_F32, kInt = XLA_FFI_DataType_S32;

// XLA's side of the interface: errors, and the number of threads. An error is its message.

XLA_FFI_Error* CreateError(XLA_FFI_Error_Create_Args* args) {
  return reinterpret_cast<XLA_FFI_Error*>(new std::string(args->message));
}
void DestroyError(XLA_FFI_Error_Destroy_Args* args) { delete reinterpret_cast<std::string*>(args->error); }
void ErrorDetails(XLA_FFI_Error_GetDetails_Args* args) {
  args->message = reinterpret_cast<std::string*>(args->error)->c_str();
}
XLA_FFI_Error* NumThreads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = *reinterpret_cast<int64_t*>(args->ctx);
  return nullptr;
}

// Arrays and calls

using Random = std::mt19937_64;

int64_t Draw(Random& rng, int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(rng);
}

// A size: mostly small, sometimes around a multiple of a register or a tile, seldom large.
int64_t Size(Random& rng, int64_t most) {
  const int64_t kind = Draw(rng, 0, 9);
  if (kind < 5) return Draw(rng, 1, std::min<int64_t>(most, 9));
  if (kind < 8) return std::min(most, std::max<int64_t>(1, (int64_t{8} << Draw(rng, 0, 4)) + Draw(rng, -1, 1)));
  return Draw(rng, 1, most);
}

int64_t Rows(Random& rng) { return Draw(rng, 0, 9) == 0 ? 0 : Size(rng, 40); }

using Dims = std::vector<int64_t>;

// An array of a call. `Run` copies it to the memory that a kernel sees.
struct Array {
  XLA_FFI_DataType type;
  Dims dims;
  std::vector<uint8_t> bytes;

  int64_t count() const { return std::accumulate(dims.begin(), dims.end(), int64_t{1}, std::multiplies<int64_t>()); }
  int64_t width() const { return type == kFloat || type == kInt ? 4 : type == XLA_FFI_DataType_BF16 ? 2 : 1; }
};

Array Empty(Dims dims, XLA_FFI_DataType type = kFloat) {
  Array made{type, std::move(dims), {}};
  made.bytes.assign(made.count() * made.width(), 0xff);  // NaN, where a kernel writes nothing
  return made;
}

template <typename Number>
Array Filled(const std::vector<Number>& values, Dims dims) {
  Array made = Empty(std::move(dims), std::is_same_v<Number, float> ? kFloat : kInt);
  if (!values.empty()) std::memcpy(made.bytes.data(), values.data(), made.bytes.size());
  return made;
}

Array Floats(Random& rng, Dims dims, float scale = 1) {
  std::vector<float> values(Empty(dims).count());
  std::normal_distribution<float> normal(0, scale);
  for (float& value : values) {
    const int64_t kind = Draw(rng, 0, 99);
    value = kind == 0 ? 0 : kind == 1 ? 30 * scale : normal(rng);
  }
  return Filled(values, std::move(dims));
}

std::vector<int32_t> Indices(Random& rng, int64_t count, int64_t most) {
  std::vector<int32_t> made(count);
  for (int32_t& value : made) value = static_cast<int32_t>(Draw(rng, 0, most));
  return made;
}

struct Call {
  std::vector<Array> args, rets;
  std::map<std::string, float> attrs = {};  // sorted, as XLA's are
  bool refused = false;                     // whether the kernel must end in an error
  int overwritten = -1;                     // the argument that is the first result, too; then the next ones
  int scratch = 0;                          // last results, which are not defined everywhere
};

// Runs a call. Returns the bytes of the results but for scratch; `error` gets the kernel's message.
std::vector<std::vector<uint8_t>> Run(Random& rng, XLA_FFI_Handler* kernel, const Call& call, int64_t threads,
                                      std::string& error) {
  // Exactly the bytes of an array, at an odd place: after 0 to 15 unused numbers that do not count as its own.
  std::deque<std::unique_ptr<uint8_t[]>> memory;
  std::deque<XLA_FFI_Buffer> buffers;
  const auto place = [&](const Array& array) -> void* {
    const size_t before = array.width() * Draw(rng, 0, 15);
    uint8_t* at = memory.emplace_back(new uint8_t[before + array.bytes.size()]).get() + before;
    std::copy(array.bytes.begin(), array.bytes.end(), at);
    auto* dims = const_cast<int64_t*>(array.dims.data());
    return &buffers.emplace_back(XLA_FFI_Buffer{XLA_FFI_Buffer_STRUCT_SIZE, nullptr, array.type, at,
                                                static_cast<int64_t>(array.dims.size()), dims});
  };
  std::vector<void*> args, rets, values;
  for (const Array& array : call.args) args.push_back(place(array));
  for (size_t i = 0; i < call.rets.size(); ++i)
    rets.push_back(call.overwritten < 0 ? place(call.rets[i]) : args[call.overwritten + i]);

  // Attributes are floats, but for those that the kernels take as bool.
  std::deque<XLA_FFI_ByteSpan> spans;
  std::deque<XLA_FFI_Scalar> scalars;
  std::vector<XLA_FFI_ByteSpan*> names;
  bool yes = true, no = false;
  for (const auto& [name, value] : call.attrs) {
    names.push_back(&spans.emplace_back(XLA_FFI_ByteSpan{name.data(), name.size()}));
    XLA_FFI_Scalar scalar{kFloat, const_cast<float*>(&value)};
    if (name == "transposed") scalar = {XLA_FFI_DataType_PRED, value != 0 ? &yes : &no};
    values.push_back(&scalars.emplace_back(scalar));
  }

  std::vector<XLA_FFI_ArgType> arg_types(args.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(rets.size(), XLA_FFI_RetType_BUFFER);
  std::vector<XLA_FFI_AttrType> attr_types(values.size(), XLA_FFI_AttrType_SCALAR);
  XLA_FFI_Api api{};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
  api.XLA_FFI_Error_Create = CreateError;
  api.XLA_FFI_Error_Destroy = DestroyError;
  api.XLA_FFI_Error_GetDetails = ErrorDetails;
  api.XLA_FFI_ThreadPool_NumThreads = NumThreads;
  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.ctx = reinterpret_cast<XLA_FFI_InvokeContext*>(&threads);
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  const auto size = [](const auto& items) { return static_cast<int64_t>(items.size()); };
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, size(args), arg_types.data(), args.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, size(rets), ret_types.data(), rets.data()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, size(values), attr_types.data(), names.data(), values.data()};
  if (XLA_FFI_Error* failed = kernel(&frame)) {
    const std::unique_ptr<std::string> message(reinterpret_cast<std::string*>(failed));
    error = *message;
  }
  std::vector<std::vector<uint8_t>> results;
  for (size_t i = 0; i + call.scratch < rets.size(); ++i) {
    const auto* at = static_cast<uint8_t*>(static_cast<XLA_FFI_Buffer*>(rets[i])->data);
    results.emplace_back(at, at + call.rets[i].bytes.size());
  }
  return results;
}

// Cases: one function a kernel

Call Matmul(Random& rng) {
  const int64_t n = Rows(rng), d = Size(rng, 600), w = Size(rng, 700);
  return {{Floats(rng, {n, d}), Floats(rng, {d, w})}, {Empty({n, w})}};
}

Call Swiglu(Random& rng) {
  const int64_t n = Rows(rng), d = Size(rng, 300), f = Size(rng, 600);
  const Array w_gate = Floats(rng, {d, f}, 0.1f), w_up = Floats(rng, {d, f}, 0.1f), w_down = Floats(rng, {f, d}, 0.1f);
  return {{Floats(rng, {n, d}), w_gate, w_up, w_down}, {Empty({n, d})}};
}

Call ByHead(Random& rng) {
  const int64_t n = Rows(rng), h = Size(rng, 20), k = Size(rng, 130), w = Size(rng, 130), transposed = Draw(rng, 0, 1);
  const Array matrix = Floats(rng, transposed ? Dims{h, w, k} : Dims{h, k, w});
  return {{Floats(rng, {n, h, k}), matrix}, {Empty({n, h, w})}, {{"transposed", transposed}}};
}

// The experts' matrices, as last arguments.
void AddMatrices(Random& rng, int64_t e, int64_t d, int64_t f, std::vector<Array>& args) {
  for (const Dims& dims : {Dims{e, d, f}, Dims{e, d, f}, Dims{e, f, d}}) args.push_back(Floats(rng, dims, 0.1f));
}

Call Decode(Random& rng) {
  const int64_t n = Rows(rng), e = Size(rng, 16), d = Size(rng, 100), k = Draw(rng, 1, std::min<int64_t>(e, 4));
  const bool wrong = Draw(rng, 0, 19) == 0 && n > 0;
  std::vector<int32_t> ids = Indices(rng, n * k, e - 1);
  if (wrong) ids[Draw(rng, 0, n * k - 1)] = Draw(rng, 0, 1) ? -1 : static_cast<int32_t>(e);
  std::vector<Array> args = {Floats(rng, {n, d}), Filled(ids, {n, k}), Floats(rng, {n, k})};
  AddMatrices(rng, e, d, Size(rng, 100), args);
  return {args, {Empty({n, d})}, {}, wrong};
}

Call Cached(Random& rng) {
  const int64_t b = Draw(rng, 1, 3), g = Draw(rng, 1, 3), q = Size(rng, 12), s = Size(rng, 700), v = Size(rng, 80);
  const XLA_FFI_DataType types[] = {kFloat, XLA_FFI_DataType_BF16, XLA_FFI_DataType_S8, XLA_FFI_DataType_F8E4M3FN};
  const XLA_FFI_DataType type = types[Draw(rng, 0, 3)];
  const auto rows_of = [&](int64_t x) {
    if (type == kFloat) return Floats(rng, {1, b, g, s, x});
    Array rows = Empty({1, b, g, s, x}, type);
    for (uint8_t& byte : rows.bytes) byte = static_cast<uint8_t>(Draw(rng, 0, 0x7d) & 0x3f);  // finite in each format
    return rows;
  };
  const Array values = rows_of(v);
  const bool scaled = values.width() == 1;
  const auto scales_of = [&] { return scaled ? Floats(rng, {1, b, g, s, 1}, 0.1f) : Empty({0}); };
  const int64_t wrong = Draw(rng, 0, 19);  // 0: a row outside the cache; 1: no scales
  std::vector<int32_t> last = Indices(rng, b * q, s - 1);
  if (wrong == 0) last[Draw(rng, 0, b * q - 1)] = Draw(rng, 0, 1) ? -1 : static_cast<int32_t>(s);
  const Array scales = wrong == 1 ? Empty({0}) : scales_of();
  std::vector<Array> args = {values, scales, Filled(last, {b, q})};
  const int64_t keys = Draw(rng, 1, 3);
  for (int64_t i = 0; i < keys; ++i) {  // the first array of keys is often the values'
    const bool shared = i == 0 && Draw(rng, 0, 2) > 0;
    const int64_t x = shared ? v : Size(rng, 80);
    args.push_back(Floats(rng, {b, g, q, Draw(rng, 1, x)}, 0.3f));
    args.push_back(shared ? values : rows_of(x));
    args.push_back(shared ? scales : scales_of());
  }
  return {args, {Empty({b, g, q, v})}, {{"scale", 0.5f}}, wrong == 0 || (wrong == 1 && scaled)};
}

Call Write(Random& rng) {
  const int64_t l = Draw(rng, 1, 2), b = Draw(rng, 1, 4), g = Draw(rng, 1, 3), t = Size(rng, 9), s = t + Size(rng, 90);
  const int64_t layer = Draw(rng, 0, 19) == 0 ? l : Draw(rng, 0, l - 1), arrays = Draw(rng, 1, 3);
  std::vector<Array> stored, rows;
  for (int64_t i = 0; i < arrays; ++i) {
    const int64_t x = Size(rng, 80);
    stored.push_back(Floats(rng, {l, b, g, s, x}));
    rows.push_back(Floats(rng, {b, g, t, x}));
  }
  std::vector<Array> args = {Filled(std::vector<int32_t>{static_cast<int32_t>(layer)}, {}),
                             Filled(Indices(rng, b, s - t), {b})};
  args.insert(args.end(), stored.begin(), stored.end());
  args.insert(args.end(), rows.begin(), rows.end());
  return {args, stored, {}, layer == l, 2};
}

// The shared arguments of the experts' kernels: n tokens that chose k of e experts.
Call Routed(Random& rng) {
  const int64_t n = Draw(rng, 0, 9) == 0 ? 0 : Size(rng, Draw(rng, 0, 19) == 0 ? 700 : 90), e = Size(rng, 12);
  const int64_t d = Size(rng, 100), k = Draw(rng, 1, std::min<int64_t>(e, 4)), rows = n * k;
  const std::vector<int32_t> ids = Indices(rng, rows, Draw(rng, 0, 3) ? e - 1 : 0);
  std::vector<int32_t> order(rows), place(rows), counts(e);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t i, int32_t j) { return ids[i] < ids[j]; });
  for (int64_t r = 0; r < rows; ++r) {
    place[order[r]] = static_cast<int32_t>(r);
    ++counts[ids[r]];
  }
  const int64_t wrong = Draw(rng, 0, 29);
  if (wrong == 0) counts[0] += 1;
  if (wrong == 1 && rows > 0) order[0] = static_cast<int32_t>(rows);
  if (wrong == 2 && rows > 0) place[rows - 1] = -1;
  std::vector<Array> args = {Floats(rng, {n, d}), Floats(rng, {n, k}), Filled(order, {rows}), Filled(place, {n, k}),
                             Filled(counts, {e})};
  AddMatrices(rng, e, d, Size(rng, 100), args);
  return {args, {}, {}, wrong == 0 || (rows > 0 && wrong <= 2), -1, 1};
}

Call Experts(Random& rng) {
  Call call = Routed(rng);
  const Array &x = call.args[0], &order = call.args[2], &w_gate = call.args[5];
  const int64_t rows = order.count(), kept = Draw(rng, 0, 1) ? rows : 0, d = x.dims[1], f = w_gate.dims[2];
  call.rets = {Empty(x.dims), Empty({kept, f}), Empty({kept, f}), Empty({rows, d})};
  return call;
}

Call ExpertsGradients(Random& rng) {
  Call call = Routed(rng);
  const Dims x = call.args[0].dims, gates = call.args[1].dims, w_gate = call.args[5].dims;
  const int64_t rows = call.args[2].count(), d = w_gate[1], f = w_gate[2], trained = Draw(rng, 0, 3) ? w_gate[0] : 0;
  for (const Dims& dims : {x, Dims{rows, f}, Dims{rows, f}}) call.args.push_back(Floats(rng, dims));
  for (const Dims& dims : {x, gates, Dims{trained, d, f}, Dims{trained, d, f}, Dims{trained, f, d}, Dims{rows, d}})
    call.rets.push_back(Empty(dims));
  return call;
}

Call Causal(Random& rng) {
  const int64_t b = Draw(rng, 0, 9) == 0 ? 0 : Draw(rng, 1, 2), t = Size(rng, Draw(rng, 0, 9) == 0 ? 400 : 80);
  const int64_t h = Draw(rng, 1, 3), k = Size(rng, 70), v = Size(rng, 70);
  std::vector<int32_t> segments(b * t);
  for (int64_t i = 0; i < b * t; ++i)
    segments[i] = i % t == 0 ? static_cast<int32_t>(Draw(rng, 0, 2)) : segments[i - 1] + (Draw(rng, 0, 15) == 0);
  const Array queries = Floats(rng, {b, t, h, k}, 0.3f), keys = Floats(rng, {b, t, h, k});
  return {{queries, keys, Floats(rng, {b, t, h, v}), Filled(segments, {b, t})},
          {Empty({b, t, h, v}), Empty({b, h, t}), Empty({b, h, t})}};
}

Call CausalGradients(Random& rng) {
  Call call = Causal(rng);
  std::string error;
  const auto results = Run(rng, Dsv3CausalAttention, call, 1, error);
  for (int i = 0; i < 2; ++i) call.args.push_back({kFloat, call.rets[i].dims, results[i]});
  call.args.push_back(Floats(rng, call.rets[0].dims));
  call.rets = {Empty(call.args[0].dims), Empty(call.args[1].dims), Empty(call.args[2].dims)};
  return call;
}

Call Adamw(Random& rng) {
  const int64_t kind = Draw(rng, 0, 9), n = kind == 0 ? 0 : kind == 1 ? Draw(rng, 1, 200'000) : Size(rng, 3000);
  std::vector<Array> args = {Floats(rng, {n}), Floats(rng, {n}), Floats(rng, {n}), Floats(rng, {n})};
  for (int64_t i = 0; i < n; ++i) args[2].bytes[i * 4 + 3] &= 0x7f;  // a mean of squares is not negative
  args.push_back(Filled<float>({0.5f, 1.2f, 1.1f, 1e-3f, static_cast<float>(Draw(rng, 0, 4) > 0)}, {5}));
  return {args, {args[0], args[1], args[2]}, {{"beta1", 0.9f}, {"beta2", 0.95f}, {"eps", 1e-8f}, {"decay", 0.1f}},
          false, 0};
}

const struct Kind {
  const char* name;
  XLA_FFI_Handler* kernel;
  Call (*make)(Random&);
} kKinds[] = {
    {"matmul", Dsv3SmallBatchMatmul, Matmul},
    {"swiglu", Dsv3SmallBatchSwiglu, Swiglu},
    {"by head", Dsv3SmallBatchByHead, ByHead},
    {"decode experts", Dsv3DecodeExperts, Decode},
    {"cached attention", Dsv3CachedAttention, Cached},
    {"write rows", Dsv3WriteRows, Write},
    {"experts", Dsv3ExpertsSwiglu, Experts},
    {"experts' gradients", Dsv3ExpertsSwigluGradients, ExpertsGradients},
    {"causal attention", Dsv3CausalAttention, Causal},
    {"causal attention's gradients", Dsv3CausalAttentionGradients, CausalGradients},
    {"AdamW", Dsv3Adamw, Adamw},
};

bool Finite(const std::vector<uint8_t>& bytes) {
  for (size_t i = 0; i + 4 <= bytes.size(); i += 4) {
    float value;
    std::memcpy(&value, &bytes[i], 4);
    if (!std::isfinite(value)) return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const auto begin = std::chrono::steady_clock::now();
  const std::chrono::duration<double> limit(std::atof(argv[3]));
  for (int64_t number = std::atoll(argv[2]);; ++number) {
    std::seed_seq seed{std::atoll(argv[1]), static_cast<long long>(number)};
    Random rng(seed);
    const Kind& kind = kKinds[number % std::size(kKinds)];
    const Call call = kind.make(rng);
    std::printf("%lld %s", static_cast<long long>(number), kind.name);
    for (const Array& array : call.args) {
      std::printf(" [");
      for (int64_t size : array.dims) std::printf(" %lld", static_cast<long long>(size));
      std::printf(" ]");
    }
    std::printf("\n");
    std::fflush(stdout);
    std::string errors[2];
    const auto one = Run(rng, kind.kernel, call, 1, errors[0]);
    const auto several = Run(rng, kind.kernel, call, kThreads, errors[1]);
    const char* fault = nullptr;
    if (errors[0] != errors[1] || errors[0].empty() == call.refused) fault = "refused wrongly";
    if (!call.refused && one != several) fault = "differs by the number of threads";
    if (!call.refused && !std::all_of(one.begin(), one.end(), Finite)) fault = "not finite";
    if (fault) {
      std::printf("fault: %s %s\n", fault, errors[0].c_str());
      return 3;
    }
    if (std::chrono::steady_clock::now() - begin > limit) return 0;
  }
}
