// Calls every C++ kernel with arrays of random shapes, without XLA or Python, for the compilers' sanitizers.
//
//   sanitized_kernels SEED FIRST SECONDS    cases from number FIRST on; prints "N name shape" before case N
//
// An array is allocated to its exact size, so an access outside it is reported, and begins at a random multiple of 4
// bytes, whereas XLA's begin at multiples of 64. A case runs on one thread and on several. The results must be finite
// and the same to the last bit. One of 100 numbers is 0, and one is large.

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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
    *Dsv3ExpertsSwiglu(XLA_FFI_CallFrame*),
    *Dsv3ExpertsSwigluGradients(XLA_FFI_CallFrame*),
    *Dsv3CausalAttention(XLA_FFI_CallFrame*), *Dsv3CausalAttentionGradients(XLA_FFI_CallFrame*),
    *Dsv3Adamw(XLA_FFI_CallFrame*);
}

namespace {

constexpr int64_t kThreads = 3;

// XLA's side of the interface: errors, and the number of threads.

struct XlaError {
  std::string message;
};

XLA_FFI_Error* CreateError(XLA_FFI_Error_Create_Args* args) {
  return reinterpret_cast<XLA_FFI_Error*>(new XlaError{args->message});
}
void DestroyError(XLA_FFI_Error_Destroy_Args* args) { delete reinterpret_cast<XlaError*>(args->error); }
void ErrorDetails(XLA_FFI_Error_GetDetails_Args* args) {
  args->message = reinterpret_cast<XlaError*>(args->error)->message.c_str();
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

// An array of a call. Its copies have separate memory.
struct Array {
  XLA_FFI_DataType type = XLA_FFI_DataType_F32;
  std::vector<int64_t> dims;
  std::vector<uint8_t> bytes;

  int64_t count() const { return std::accumulate(dims.begin(), dims.end(), int64_t{1}, std::multiplies<int64_t>()); }
  int64_t width() const {
    return type == XLA_FFI_DataType_F32 || type == XLA_FFI_DataType_S32 ? 4 : type == XLA_FFI_DataType_BF16 ? 2 : 1;
  }
};

Array Empty(std::vector<int64_t> dims, XLA_FFI_DataType type = XLA_FFI_DataType_F32) {
  Array made{type, std::move(dims), {}};
  made.bytes.assign(made.count() * made.width(), 0xff);  // NaN, where a kernel writes nothing
  return made;
}

Array Floats(Random& rng, std::vector<int64_t> dims, float scale = 1) {
  Array made = Empty(std::move(dims));
  std::normal_distribution<float> normal(0, scale);
  for (int64_t i = 0; i < made.count(); ++i) {
    const int64_t kind = Draw(rng, 0, 99);
    const float value = kind == 0 ? 0 : kind == 1 ? 30 * scale : normal(rng);
    std::memcpy(&made.bytes[i * 4], &value, 4);
  }
  return made;
}

Array Ints(const std::vector<int32_t>& values, std::vector<int64_t> dims) {
  Array made = Empty(std::move(dims), XLA_FFI_DataType_S32);
  if (!values.empty()) std::memcpy(made.bytes.data(), values.data(), values.size() * 4);
  return made;
}

Array Constant(const std::vector<float>& values) {
  Array made = Empty({static_cast<int64_t>(values.size())});
  if (!values.empty()) std::memcpy(made.bytes.data(), values.data(), values.size() * 4);
  return made;
}

// A scalar attribute.
struct Attribute {
  XLA_FFI_DataType type;
  int64_t bits;  // its bytes, from the lowest
};
Attribute Whole(int64_t value) { return {XLA_FFI_DataType_S64, value}; }
Attribute Bool(bool value) { return {XLA_FFI_DataType_PRED, value}; }
Attribute Real(float value) {
  Attribute made{XLA_FFI_DataType_F32, 0};
  std::memcpy(&made.bits, &value, 4);
  return made;
}

struct Call {
  std::string name;
  XLA_FFI_Handler* kernel;
  std::vector<Array> args, rets;
  std::map<std::string, Attribute> attrs;
  std::map<int, int> alias;   // result → argument that it overwrites
  std::vector<int> compared;  // results that are defined everywhere; others are scratch
  bool refused = false;       // whether the kernel must end in an error
};

// Memory for one array at an odd place: exactly its bytes, after 0 to 15 unused floats that do not count as its own.
struct Placed {
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* at;
  std::vector<int64_t> dims;
  XLA_FFI_Buffer buffer;

  Placed(Random& rng, const Array& array) : dims(array.dims) {
    // Numbers of one byte or two may begin anywhere that is a multiple of their width.
    const size_t before = array.width() * Draw(rng, 0, 15);
    memory.reset(new uint8_t[before + array.bytes.size()]);
    at = memory.get() + before;
    if (!array.bytes.empty()) std::memcpy(at, array.bytes.data(), array.bytes.size());
    buffer = {XLA_FFI_Buffer_STRUCT_SIZE, nullptr, array.type, at, static_cast<int64_t>(dims.size()), dims.data()};
  }
};

// Runs a call. Returns the bytes of the compared results; `error` gets the kernel's message.
std::vector<std::vector<uint8_t>> Run(Random& rng, const Call& call, int64_t threads, std::string& error) {
  XLA_FFI_Api api{};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
  api.XLA_FFI_Error_Create = CreateError, api.XLA_FFI_Error_Destroy = DestroyError;
  api.XLA_FFI_Error_GetDetails = ErrorDetails, api.XLA_FFI_ThreadPool_NumThreads = NumThreads;

  std::vector<std::unique_ptr<Placed>> args, own;
  std::vector<Placed*> rets;
  for (const Array& array : call.args) args.push_back(std::make_unique<Placed>(rng, array));
  for (size_t i = 0; i < call.rets.size(); ++i) {
    const auto alias = call.alias.find(static_cast<int>(i));
    if (alias == call.alias.end()) own.push_back(std::make_unique<Placed>(rng, call.rets[i]));
    rets.push_back(alias == call.alias.end() ? own.back().get() : args[alias->second].get());
  }
  std::vector<void*> arg_buffers, ret_buffers, attr_values;
  for (auto& placed : args) arg_buffers.push_back(&placed->buffer);
  for (Placed* placed : rets) ret_buffers.push_back(&placed->buffer);
  std::vector<XLA_FFI_ArgType> arg_types(args.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(rets.size(), XLA_FFI_RetType_BUFFER);
  std::vector<XLA_FFI_AttrType> attr_types(call.attrs.size(), XLA_FFI_AttrType_SCALAR);
  std::vector<XLA_FFI_ByteSpan> names;
  std::vector<XLA_FFI_Scalar> scalars;
  std::vector<int64_t> bits;
  names.reserve(call.attrs.size()), scalars.reserve(call.attrs.size()), bits.reserve(call.attrs.size());
  std::vector<XLA_FFI_ByteSpan*> name_pointers;
  for (const auto& [name, value] : call.attrs) {  // a map is sorted, as XLA's attributes are
    names.push_back({name.data(), name.size()}), bits.push_back(value.bits);
    scalars.push_back({value.type, &bits.back()});
    name_pointers.push_back(&names.back()), attr_values.push_back(&scalars.back());
  }

  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api, frame.ctx = reinterpret_cast<XLA_FFI_InvokeContext*>(&threads);
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(args.size()), arg_types.data(),
                arg_buffers.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(rets.size()), ret_types.data(),
                ret_buffers.data()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, static_cast<int64_t>(scalars.size()), attr_types.data(),
                 name_pointers.data(), attr_values.data()};
  if (XLA_FFI_Error* failed = call.kernel(&frame)) {
    error = reinterpret_cast<XlaError*>(failed)->message;
    delete reinterpret_cast<XlaError*>(failed);
  }
  std::vector<std::vector<uint8_t>> results;
  for (int i : call.compared) results.emplace_back(rets[i]->at, rets[i]->at + call.rets[i].bytes.size());
  return results;
}

// Cases: one function a kernel

std::vector<int32_t> Indices(Random& rng, int64_t count, int64_t most) {
  std::vector<int32_t> made(count);
  for (int32_t& value : made) value = static_cast<int32_t>(Draw(rng, 0, most));
  return made;
}

int64_t Rows(Random& rng) { return Draw(rng, 0, 9) == 0 ? 0 : Size(rng, 40); }

Call Matmul(Random& rng) {
  const int64_t n = Rows(rng), d = Size(rng, 600), w = Size(rng, 700);
  return {"matmul", Dsv3SmallBatchMatmul, {Floats(rng, {n, d}), Floats(rng, {d, w})}, {Empty({n, w})}, {}, {}, {0}};
}

Call Swiglu(Random& rng) {
  const int64_t n = Rows(rng), d = Size(rng, 300), f = Size(rng, 600);
  return {"swiglu", Dsv3SmallBatchSwiglu,
          {Floats(rng, {n, d}), Floats(rng, {d, f}, 0.1f), Floats(rng, {d, f}, 0.1f), Floats(rng, {f, d}, 0.1f)},
          {Empty({n, d})}, {}, {}, {0}};
}

Call ByHead(Random& rng) {
  const int64_t n = Rows(rng), h = Size(rng, 20), k = Size(rng, 130), w = Size(rng, 130);
  const bool transposed = Draw(rng, 0, 1);
  Array matrix = transposed ? Floats(rng, {h, w, k}) : Floats(rng, {h, k, w});
  return {"by head", Dsv3SmallBatchByHead, {Floats(rng, {n, h, k}), matrix}, {Empty({n, h, w})},
          {{"transposed", Bool(transposed)}}, {}, {0}};
}

Call Decode(Random& rng) {
  const int64_t n = Rows(rng), e = Size(rng, 16), d = Size(rng, 100), f = Size(rng, 100);
  const int64_t k = Draw(rng, 1, std::min<int64_t>(e, 4));
  const bool wrong = Draw(rng, 0, 19) == 0 && n > 0;
  std::vector<int32_t> ids = Indices(rng, n * k, e - 1);
  if (wrong) ids[Draw(rng, 0, n * k - 1)] = Draw(rng, 0, 1) ? -1 : static_cast<int32_t>(e);
  Call call{"decode experts", Dsv3DecodeExperts,
            {Floats(rng, {n, d}), Ints(ids, {n, k}), Floats(rng, {n, k}), Floats(rng, {e, d, f}, 0.1f),
             Floats(rng, {e, d, f}, 0.1f), Floats(rng, {e, f, d}, 0.1f)},
            {Empty({n, d})}, {}, {}, {0}};
  call.refused = wrong;
  return call;
}

Call Cached(Random& rng) {
  const int64_t b = Draw(rng, 1, 3), g = Draw(rng, 1, 3), q = Size(rng, 12), s = Size(rng, 700);
  const int64_t others = Draw(rng, 0, 2), wrong = Draw(rng, 0, 19);
  const XLA_FFI_DataType types[] = {XLA_FFI_DataType_F32, XLA_FFI_DataType_BF16, XLA_FFI_DataType_S8,
                                    XLA_FFI_DataType_F8E4M3FN};
  const XLA_FFI_DataType type = types[Draw(rng, 0, 3)];
  const auto rows_of = [&](int64_t x) {
    if (type == XLA_FFI_DataType_F32) return Floats(rng, {b, g, s, x});
    Array rows = Empty({b, g, s, x}, type);
    for (uint8_t& byte : rows.bytes) byte = static_cast<uint8_t>(Draw(rng, 0, 0x7d) & 0x3f);  // finite in each format
    return rows;
  };
  const int64_t v = Size(rng, 80);
  const Array values = rows_of(v);
  const bool scaled = values.width() == 1;
  const auto scales_of = [&] { return scaled ? Floats(rng, {b, g, s, 1}, 0.1f) : Empty({0}); };
  std::vector<int32_t> last = Indices(rng, b * q, s - 1);
  if (wrong == 0) last[Draw(rng, 0, b * q - 1)] = Draw(rng, 0, 1) ? -1 : static_cast<int32_t>(s);
  const Array scales = wrong == 1 ? Empty({0}) : scales_of();
  std::vector<Array> args = {values, scales, Ints(last, {b, q})};
  for (int64_t i = 0; i <= others; ++i) {  // the first array of keys is often the values'
    const bool shared = i == 0 && Draw(rng, 0, 2) > 0;
    const int64_t x = shared ? v : Size(rng, 80);
    args.push_back(Floats(rng, {b, g, q, Draw(rng, 1, x)}, 0.3f));
    args.push_back(shared ? values : rows_of(x)), args.push_back(shared ? scales : scales_of());
  }
  Call call{"cached attention", Dsv3CachedAttention, args, {Empty({b, g, q, v})}, {{"scale", Real(0.5f)}}, {}, {0}};
  call.refused = wrong == 0 || (wrong == 1 && scaled);
  return call;
}

Call Write(Random& rng) {
  const int64_t l = Draw(rng, 1, 2), b = Draw(rng, 1, 4), g = Draw(rng, 1, 3), t = Size(rng, 9), s = t + Size(rng, 90);
  const int64_t layer = Draw(rng, 0, 19) == 0 ? l : Draw(rng, 0, l - 1), arrays = Draw(rng, 1, 3);
  std::vector<Array> args = {Ints({static_cast<int32_t>(layer)}, {}), Ints(Indices(rng, b, s - t), {b})}, stored, rows;
  for (int64_t i = 0; i < arrays; ++i) {
    const int64_t x = Size(rng, 80);
    stored.push_back(Floats(rng, {l, b, g, s, x})), rows.push_back(Floats(rng, {b, g, t, x}));
  }
  Call call{"write rows", Dsv3WriteRows, args, stored, {}, {}, {}};
  for (int i = 0; i < arrays; ++i) call.alias[i] = 2 + i, call.compared.push_back(i);
  call.args.insert(call.args.end(), stored.begin(), stored.end());
  call.args.insert(call.args.end(), rows.begin(), rows.end());
  call.refused = layer == l;
  return call;
}

// The shared arguments of the experts' kernels: n tokens that chose k of e experts.
struct Routing {
  int64_t n, e, d, f, k;
  std::vector<Array> args;
  bool refused;
};

Routing Route(Random& rng) {
  Routing made{};
  made.n = Draw(rng, 0, 9) == 0 ? 0 : Size(rng, Draw(rng, 0, 19) == 0 ? 700 : 90);
  made.e = Size(rng, 12), made.d = Size(rng, 100), made.f = Size(rng, 100);
  made.k = Draw(rng, 1, std::min<int64_t>(made.e, 4));
  const int64_t rows = made.n * made.k, wrong = Draw(rng, 0, 29);
  const std::vector<int32_t> ids = Indices(rng, rows, Draw(rng, 0, 3) ? made.e - 1 : 0);
  std::vector<int32_t> order(rows), place(rows), counts(made.e);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t i, int32_t j) { return ids[i] < ids[j]; });
  for (int64_t r = 0; r < rows; ++r) place[order[r]] = static_cast<int32_t>(r), ++counts[ids[r]];
  if (wrong == 0) counts[0] += 1;
  if (wrong == 1 && rows > 0) order[0] = static_cast<int32_t>(rows);
  if (wrong == 2 && rows > 0) place[rows - 1] = -1;
  made.refused = wrong == 0 || (rows > 0 && (wrong == 1 || wrong == 2));
  made.args = {Floats(rng, {made.n, made.d}), Floats(rng, {made.n, made.k}), Ints(order, {rows}),
               Ints(place, {made.n, made.k}), Ints(counts, {made.e})};
  for (int i = 0; i < 3; ++i)
    made.args.push_back(Floats(rng, {made.e, i < 2 ? made.d : made.f, i < 2 ? made.f : made.d}, 0.1f));
  return made;
}

Call Experts(Random& rng) {
  const Routing made = Route(rng);
  const int64_t rows = made.n * made.k, kept = Draw(rng, 0, 1) ? rows : 0;
  Call call{"experts", Dsv3ExpertsSwiglu, made.args,
            {Empty({made.n, made.d}), Empty({kept, made.f}), Empty({kept, made.f}), Empty({rows, made.d})},
            {}, {}, {0, 1, 2}};
  call.refused = made.refused;
  return call;
}

Call ExpertsGradients(Random& rng) {
  const Routing made = Route(rng);
  const int64_t rows = made.n * made.k, trained = Draw(rng, 0, 3) ? made.e : 0;  // 0: frozen
  std::vector<Array> args = made.args;
  args.push_back(Floats(rng, {made.n, made.d}));
  args.push_back(Floats(rng, {rows, made.f})), args.push_back(Floats(rng, {rows, made.f}));
  Call call{"experts' gradients", Dsv3ExpertsSwigluGradients, args,
            {Empty({made.n, made.d}), Empty({made.n, made.k}), Empty({trained, made.d, made.f}),
             Empty({trained, made.d, made.f}), Empty({trained, made.f, made.d}), Empty({rows, made.d})},
            {}, {}, {0, 1, 2, 3, 4}};
  call.refused = made.refused;
  return call;
}

// The shared arguments of the causal kernels: q, k, v and the segments.
std::vector<Array> Texts(Random& rng, int64_t& b, int64_t& t, int64_t& h, int64_t& k, int64_t& v) {
  b = Draw(rng, 0, 9) == 0 ? 0 : Draw(rng, 1, 2), t = Size(rng, Draw(rng, 0, 9) == 0 ? 400 : 80), h = Draw(rng, 1, 3);
  k = Size(rng, 70), v = Size(rng, 70);
  std::vector<int32_t> segments(b * t);
  for (int64_t i = 0; i < b * t; ++i)
    segments[i] = i % t == 0 ? static_cast<int32_t>(Draw(rng, 0, 2)) : segments[i - 1] + (Draw(rng, 0, 15) == 0);
  return {Floats(rng, {b, t, h, k}, 0.3f), Floats(rng, {b, t, h, k}), Floats(rng, {b, t, h, v}), Ints(segments, {b, t})};
}

Call Causal(Random& rng) {
  int64_t b, t, h, k, v;
  const std::vector<Array> args = Texts(rng, b, t, h, k, v);
  return {"causal attention", Dsv3CausalAttention, args, {Empty({b, t, h, v}), Empty({b, h, t}), Empty({b, h, t})},
          {}, {}, {0, 1, 2}};
}

Call CausalGradients(Random& rng) {
  int64_t b, t, h, k, v;
  std::vector<Array> args = Texts(rng, b, t, h, k, v);
  std::string error;
  const Call forward{"", Dsv3CausalAttention, args, {Empty({b, t, h, v}), Empty({b, h, t}), Empty({b, h, t})},
                     {}, {}, {0, 1, 2}};
  const auto results = Run(rng, forward, 1, error);
  for (int i = 0; i < 2; ++i) args.push_back(forward.rets[i]), args.back().bytes = results[i];
  args.push_back(Floats(rng, {b, t, h, v}));
  return {"causal attention's gradients", Dsv3CausalAttentionGradients, args,
          {Empty({b, t, h, k}), Empty({b, t, h, k}), Empty({b, t, h, v})}, {}, {}, {0, 1, 2}};
}

Call Adamw(Random& rng) {
  const int64_t kind = Draw(rng, 0, 9), n = kind == 0 ? 0 : kind == 1 ? Draw(rng, 1, 200'000) : Size(rng, 3000);
  std::vector<Array> args = {Floats(rng, {n}), Floats(rng, {n}), Floats(rng, {n}), Floats(rng, {n})};
  for (int64_t i = 0; i < n; ++i) args[2].bytes[i * 4 + 3] &= 0x7f;  // a mean of squares is not negative
  args.push_back(Constant({0.5f, 1.2f, 1.1f, 1e-3f, static_cast<float>(Draw(rng, 0, 4) > 0)}));
  return {"AdamW", Dsv3Adamw, args, {args[0], args[1], args[2]},
          {{"beta1", Real(0.9f)}, {"beta2", Real(0.95f)}, {"eps", Real(1e-8f)}, {"decay", Real(0.1f)}},
          {{0, 0}, {1, 1}, {2, 2}}, {0, 1, 2}};
}

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
  Call (*const kinds[])(Random&) = {Matmul,  Swiglu,           ByHead, Decode,          Cached, Write,
                                    Experts, ExpertsGradients, Causal, CausalGradients, Adamw};
  const auto begin = std::chrono::steady_clock::now();
  const std::chrono::duration<double> limit(std::atof(argv[3]));
  for (int64_t number = std::atoll(argv[2]);; ++number) {
    std::seed_seq seed{std::atoll(argv[1]), static_cast<long long>(number)};
    Random rng(seed);
    const Call call = kinds[number % std::size(kinds)](rng);
    std::printf("%lld %s", static_cast<long long>(number), call.name.c_str());
    for (const Array& array : call.args) {
      std::printf(" [");
      for (int64_t size : array.dims) std::printf(" %lld", static_cast<long long>(size));
      std::printf(" ]");
    }
    std::printf("\n");
    std::fflush(stdout);
    std::string errors[2];
    const auto one = Run(rng, call, 1, errors[0]), several = Run(rng, call, kThreads, errors[1]);
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
