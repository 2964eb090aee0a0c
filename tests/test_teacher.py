"""The teacher: no gradient, always train mode, no drop path, EMA of parameters only, masked steps."""

import torch
from torch import Tensor, nn

from esvit.records import NetworkOutput, PrototypeWeights
from esvit.teacher import Teacher

YES, NO = torch.tensor(True), torch.tensor(False)


class Backbone(nn.Module):
    """Batch norm, and noise in the place of drop path."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop_path = 0.5

    def disable_drop_path(self) -> None:
        self.drop_path = 0.0

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.linear(images))
        return x * (torch.rand(x.shape[0], 1) >= self.drop_path) if self.training else x


class Network(nn.Module):
    """The least that a multi-crop network is: crops of shape (B, 3), prototypes used by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.view_prototypes = nn.Linear(4, 5, bias=False)
        self.also_prototypes = self.view_prototypes
        self.magnitude = nn.Parameter(torch.full((5, 1), 1.1), requires_grad=False)

    def forward(self, crops: list[Tensor]) -> list[NetworkOutput]:
        pooled = [self.backbone(crop) for crop in crops]
        return [NetworkOutput(view=nn.functional.normalize(x, dim=-1), region=None, features=None, pooled=x) for x in pooled]

    def prototypes(self) -> PrototypeWeights:
        return PrototypeWeights(view=self.magnitude * self.view_prototypes.weight, region=None)


def crops(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, generator=generator) for _ in range(2)]


def student_and_teacher() -> tuple[Network, Teacher, Network]:
    """Student, its teacher, and the network inside the teacher; the student has moved on since."""
    torch.manual_seed(0)
    student = Network()
    teacher = Teacher(student)
    assert isinstance(teacher.network, Network)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return student, teacher, teacher.network


def parameters(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def test_the_teacher_starts_as_a_copy_and_not_as_the_student_itself():
    student = Network()
    teacher = Teacher(student)
    for ours, theirs in zip(teacher.network.parameters(), student.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()


def test_teacher_receives_no_gradient():
    student, teacher, _ = student_and_teacher()
    targets = teacher(crops())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not targets[0].view.requires_grad and not teacher.prototypes().view.requires_grad
    outputs = student(crops(1))
    torch.stack([(ours.view - theirs.view).square().sum() for ours, theirs in zip(outputs, targets, strict=True)]).sum().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.backbone.linear.weight.grad is not None


def test_targets_can_be_saved_for_the_students_backward():
    """Tensors made under inference_mode could not."""
    student, teacher, _ = student_and_teacher()
    target = teacher(crops())[0].view
    (student(crops())[0].view * target).sum().backward()
    assert not target.is_inference()


def test_the_student_keeps_its_drop_path_and_the_teacher_has_none():
    student, teacher, _ = student_and_teacher()
    assert student.backbone.drop_path == 0.5
    assert torch.equal(teacher(crops())[0].pooled, teacher(crops())[0].pooled)


def test_the_teacher_stays_in_train_mode_whatever_is_asked():
    _, teacher, _ = student_and_teacher()
    teacher.eval()
    assert all(module.training for module in teacher.modules())
    nn.ModuleList([teacher]).eval()
    assert all(module.training for module in teacher.modules())


def test_update_moves_every_parameter_to_the_weighted_mean():
    student, teacher, _ = student_and_teacher()
    before = parameters(teacher)
    teacher.update(student, 0.9, YES)
    for old, new, theirs in zip(before, parameters(teacher), parameters(student), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * theirs)


def test_shared_parameters_move_once_and_stay_shared():
    student, teacher, network = student_and_teacher()
    before = network.view_prototypes.weight.clone()
    teacher.update(student, 0.9, YES)
    assert network.also_prototypes.weight is network.view_prototypes.weight
    torch.testing.assert_close(network.view_prototypes.weight, 0.9 * before + 0.1 * student.view_prototypes.weight)


def test_momentum_one_changes_no_bit_and_momentum_zero_copies_the_student():
    student, teacher, _ = student_and_teacher()
    before = parameters(teacher)
    teacher.update(student, 1.0, YES)
    assert all(torch.equal(old, new) for old, new in zip(before, parameters(teacher), strict=True))
    teacher.update(student, 0.0, YES)
    assert all(torch.equal(theirs, new) for theirs, new in zip(parameters(student), parameters(teacher), strict=True))


def test_a_step_that_is_not_finite_changes_no_bit():
    student, teacher, _ = student_and_teacher()
    teacher.update(student, 0.996, YES)
    before = [value.view(torch.int32) for value in parameters(teacher)]
    teacher.update(student, 0.996, NO)
    after = [value.view(torch.int32) for value in parameters(teacher)]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_weights_on_which_both_agree_do_not_drift():
    """1.1 times (0.9999 and 0.0001 in float32) is not 1.1: the plain form would change a frozen weight a little every step."""
    student, teacher, network = student_and_teacher()
    for _ in range(1000):
        teacher.update(student, 0.9999, YES)
    assert torch.equal(network.magnitude, student.magnitude)


def test_update_leaves_batch_norm_buffers_to_the_teachers_own_passes():
    student, teacher, network = student_and_teacher()
    student(crops(1))
    start = {name: value.clone() for name, value in network.named_buffers()}
    teacher.update(student, 0.5, YES)
    assert all(torch.equal(value, start[name]) for name, value in network.named_buffers())

    images = crops()
    features = [network.backbone.linear(image) for image in images]
    teacher(images)
    expected = torch.zeros(4)
    for feature in features:
        expected = 0.9 * expected + 0.1 * feature.mean(0)
    norm = network.backbone.norm
    torch.testing.assert_close(norm.running_mean, expected)
    assert norm.num_batches_tracked == 2
