"""Texts of four kinds, for measures of what joins two tokenizers; all of them are here or in Python's own library."""

from __future__ import annotations

import ast
import inspect
import random
from collections.abc import Callable
from types import ModuleType

LENGTH = 600  # characters of a text, at most


def chinese() -> list[str]:
    """Prose, news, questions and answers, tables and poetry; simplified and traditional, with numbers and Latin letters in it."""
    return [part.strip() for part in _CHINESE.strip().split("\n\n")]


def english() -> list[str]:
    """Paragraphs of Python's language reference."""
    from pydoc_data.topics import topics

    whole = "\n\n".join(text for _, text in sorted(topics.items()))
    parts = [part for part in whole.split("\n\n") if len(part) > 150 and not part.startswith(" ")]
    return [part[:LENGTH] for part in parts[:: max(1, len(parts) // 200)]][:200]


def code() -> list[str]:
    """Functions and classes of Python's library."""
    import argparse
    import bisect
    import heapq
    import json.decoder
    import shlex
    import statistics
    import textwrap

    found: list[str] = []
    for module in (argparse, bisect, heapq, json.decoder, shlex, statistics, textwrap):
        found += _definitions(module)
    return [part[:LENGTH] for part in found[:200]]


def digits() -> list[str]:
    """Sums, dates, prices, measurements and long numbers, drawn with a fixed seed."""
    draw = random.Random(17)
    made = []
    for _ in range(200):
        a, b = draw.randrange(10**6), draw.randrange(10**4)
        made.append(
            f"{a} + {b} = {a + b}; {a} * {b} = {a * b}. On {draw.randrange(1900, 2100)}-{draw.randrange(1, 13):02}-"
            f"{draw.randrange(1, 29):02} it cost ${a / 100:,.2f}, {draw.random():.6f} of {draw.randrange(10**12):,}; "
            f"call +49 {draw.randrange(10**9)}, room {draw.randrange(1000):03}, 0x{a:06X}, {draw.random() * 1e-9:.3e}."
        )
    return made


KINDS: dict[str, Callable[[], list[str]]] = {"Chinese": chinese, "English": english, "code": code, "digits": digits}


def _definitions(module: ModuleType) -> list[str]:
    source = inspect.getsource(module)
    lines = source.splitlines()
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return ["\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes]


_CHINESE = """
知识蒸馏是一种模型压缩方法:先训练一个较大的教师模型,再让较小的学生模型学习教师输出的概率分布。与只学习正确答案相比,软标签包含了类别之间的相似关系,因此学生往往能够用更少的数据达到更好的效果。

昨天下午三点二十分,北京市气象台发布暴雨蓝色预警信号,预计未来十二小时内,房山、门头沟等地降雨量将达到50毫米以上,请有关单位和个人注意防范。

请问怎么从上海虹桥站去浦东国际机场?您可以乘坐地铁二号线,全程大约需要九十分钟,票价八元;也可以乘坐机场巴士,或者坐磁悬浮列车,最高时速可达430公里。

春眠不觉晓,处处闻啼鸟。夜来风雨声,花落知多少。
床前明月光,疑是地上霜。举头望明月,低头思故乡。

問:為什麼天空是藍色的?
答:太陽光進入大氣層之後,空氣分子會把波長較短的藍光向四面八方散射,所以我們從地面上看到的天空就是藍色的。這個現象稱為瑞利散射。

解:设这个两位数的十位数字为 x,个位数字为 y,则 10x + y = 4(x + y),整理得 6x = 3y,即 y = 2x。所以这个数可能是 12、24、36 或 48。

步骤如下:
1. 打开终端,输入 `pip install lyceum`;
2. 编辑配置文件 config.yaml,把 learning_rate 改成 0.0001;
3. 运行 `student-trainer train config.yaml`,等待训练结束。

他推开窗户,一股清凉的风扑面而来。远处的山峦在晨雾中若隐若现,像一幅淡淡的水墨画。院子里的老槐树上,几只麻雀叽叽喳喳地叫着,似乎在商量今天要飞到哪里去。

根据《中华人民共和国劳动合同法》第三十八条的规定,用人单位未及时足额支付劳动报酬的,劳动者可以解除劳动合同,并有权要求用人单位支付经济补偿。

西红柿炒鸡蛋的做法:鸡蛋三个打散,加少许盐;西红柿两个切块。锅中倒油烧热,先把鸡蛋炒熟盛出,再放入西红柿翻炒出汁,最后倒回鸡蛋,加糖和盐调味即可出锅。😋

2025年第三季度,公司实现营业收入1,234.56亿元,同比增长8.7%;归属于上市公司股东的净利润为98.7亿元,同比下降2.3%。董事会建议每10股派发现金红利3.50元(含税)。

量子纠缠是量子力学中的一种现象:两个或多个粒子相互作用之后,即使相隔很远,对其中一个粒子的测量也会立即影响另一个粒子的状态。爱因斯坦曾把它称为“鬼魅般的超距作用”。

她笑着说:“你怎么现在才来?我们都等了你半个多小时了!”小明不好意思地挠了挠头:“对不起,路上堵车……下次我一定早点儿出门。”

患者,男,45岁,因“反复上腹部疼痛三个月,加重一周”入院。查体:体温36.8℃,脉搏78次/分,血压125/80mmHg。腹软,剑突下轻压痛,无反跳痛。

臺北市立圖書館將於本週六上午十時舉辦親子閱讀活動,歡迎三至六歲的小朋友與家長一同參加。名額有限,請提前上網報名。

函数 f(x) = x² - 4x + 3 的图像是一条开口向上的抛物线,对称轴为直线 x = 2,顶点坐标为 (2, -1),与 x 轴的交点为 (1, 0) 和 (3, 0)。

鲁迅,原名周树人,浙江绍兴人,中国现代文学的奠基人之一。代表作有《狂人日记》《阿Q正传》《祝福》等。毛泽东曾评价:“鲁迅的方向,就是中华民族新文化的方向。”

这款手机采用了6.7英寸OLED屏幕,刷新率为120Hz,搭载骁龙处理器,内置5000mAh电池,支持67W有线快充和50W无线快充,起售价为人民币3999元。

def 计算平均值(数据):
    # 返回列表中所有数字的平均值
    return sum(数据) / len(数据)

天气预报:明天多云转晴,东南风三到四级,最低气温十五摄氏度,最高气温二十六摄氏度,空气质量良好,适合户外运动。
"""
